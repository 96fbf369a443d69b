# SPDX-License-Identifier: GPL-2.0-or-later
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupctl.errors import DamageFound, Failed, NoSuchPoint, RepositoryError, WriteFailed
from backupctl.images import create, nbd_server, qcow2_header
from backupctl.repository import chain
from backupctl.transfer.source import Source
from tests.unit.points import P1, P2, P3, Builder, disk_entry, write_image


def qemu_img(*arguments, cwd=None):
    subprocess.run(["qemu-img", *map(str, arguments)], cwd=cwd, check=True, capture_output=True, timeout=60)


def remake(path: Path, size_bytes: int, backing: str | None) -> None:
    """Make an image anew with another backing name and, so that only this differs, the old length."""
    length = path.stat().st_size
    path.unlink()
    create.create_layer(path, size_bytes, backing)
    os.truncate(path, length)


def info(path: Path) -> dict:
    said = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", path], check=True, capture_output=True, timeout=60
    )
    return json.loads(said.stdout)


def servers() -> set[int]:
    """The qemu-storage-daemons that are children of this process."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if entry.name.isdigit() and int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def read_all(layers, offset, length) -> bytes:
    with nbd_server.serve(layers) as address, closing(Source.connect([address], nbd_server.EXPORT)) as source:
        return bytes(source.connections[0].handle.pread(length, offset))


def test_a_layer_is_a_qcow2_with_a_relative_link_that_need_not_lead_anywhere_yet(tmp_path):
    create.create_layer(tmp_path / "vda.qcow2", 12345 * 512, f"../{P1}/vda.qcow2")
    said = info(tmp_path / "vda.qcow2")
    assert said["virtual-size"] == 12345 * 512
    assert said["cluster-size"] == 65536
    assert said["backing-filename"] == f"../{P1}/vda.qcow2"
    assert said["backing-filename-format"] == "qcow2"
    assert said["format-specific"]["data"]["compat"] == "1.1"


def test_a_layer_that_can_not_be_made_is_told(tmp_path):
    (tmp_path / "vda.qcow2").mkdir()
    with pytest.raises(WriteFailed, match="cannot create"):
        create.create_layer(tmp_path / "vda.qcow2", 512, None)


def test_a_name_that_looks_like_a_protocol_is_only_a_name(tmp_path):
    create.create_layer(tmp_path / "nbd:x.qcow2", 65536, None)
    assert (tmp_path / "nbd:x.qcow2").is_file()


def test_what_is_written_is_read_back_through_the_chain(two_points):
    builder, content = two_points
    layers = chain.paths(builder.directory, builder.directory.point(P2), "vda")
    assert [path.parent.name for path in layers] == [P2, P1]
    assert read_all(layers, 0, len(content)) == content


def test_plain_qemu_tools_read_a_point_straight_from_the_repository(two_points, tmp_path):
    builder, content = two_points
    qemu_img("convert", "-O", "raw", builder.directory.point(P2).path / "vda.qcow2", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == content


def test_a_server_ends_with_its_block(tmp_path):
    create.create_layer(tmp_path / "a.qcow2", 65536, None)
    before = servers()
    with nbd_server.serve([tmp_path / "a.qcow2"]) as address:
        assert len(servers() - before) == 1
        directory = address.parent
        assert directory.stat().st_mode & 0o777 == 0o700
    assert servers() == before
    assert not directory.exists()


def test_a_server_ends_when_its_block_raises(tmp_path):
    create.create_layer(tmp_path / "a.qcow2", 65536, None)
    before = servers()
    with pytest.raises(KeyError), nbd_server.serve([tmp_path / "a.qcow2"], writable=True):
        raise KeyError
    assert servers() == before


def test_an_image_that_qemu_can_not_open_is_told_with_its_reason(tmp_path):
    (tmp_path / "a.qcow2").write_bytes(b"no image")
    with (
        pytest.raises(RepositoryError, match="not in qcow2 format"),
        nbd_server.serve([tmp_path / "a.qcow2"]),
    ):
        raise AssertionError


def test_a_temporary_directory_that_can_not_be_had_is_told(tmp_path, monkeypatch):
    create.create_layer(tmp_path / "vda.qcow2", 1 << 20, None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    with (
        pytest.raises(Failed, match="create a temporary file"),
        nbd_server.serve([tmp_path / "vda.qcow2"]),
    ):
        pass


def test_a_missing_tool_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("QEMU_STORAGE_DAEMON", "/nonexistent/qsd")
    monkeypatch.setenv("QEMU_IMG", "/nonexistent/img")
    with pytest.raises(RepositoryError, match="/nonexistent/img"):
        create.create_layer(tmp_path / "a.qcow2", 65536, None)
    with pytest.raises(Failed, match="/nonexistent/qsd"), nbd_server.serve([tmp_path / "a.qcow2"]):
        raise AssertionError


SERVE = """
import sys, time
from pathlib import Path
from backupctl.images import nbd_server
with nbd_server.serve([Path(sys.argv[1])], writable=True) as address:
    print(address, flush=True)
    time.sleep(60)
"""


def test_a_server_does_not_outlive_a_killed_run(tmp_path):
    create.create_layer(tmp_path / "a.qcow2", 65536, None)
    run = subprocess.Popen([sys.executable, "-c", SERVE, tmp_path / "a.qcow2"], stdout=subprocess.PIPE)
    try:
        address = run.stdout.readline().decode().strip()
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait(60)
        run.stdout.close()
    # The server may have been killed with its process file made and not yet written.
    server = (Path(address).parent / "ready").read_text().strip()
    try:
        wait_for_refusal(address)
    finally:
        with suppress(ProcessLookupError):
            if server:
                os.kill(int(server), signal.SIGKILL)
        shutil.rmtree(Path(address).parent)


def wait_for_refusal(address: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(address) != 0:
                return
        assert time.monotonic() < deadline, "the server lives on"
        time.sleep(0.05)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's (108 bytes in all)."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_what_a_killed_run_left_is_swept_and_what_lives_is_not(tmp_path, short_directory, monkeypatch):
    temporary = short_directory
    create.create_layer(tmp_path / "a.qcow2", 65536, None)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    dead = temporary / "bctl-dead"
    young = temporary / "bctl-young"
    other = temporary / "somebody-elses"
    linked = temporary / "bctl-link"
    for directory in (dead, young, other):
        directory.mkdir()
        (directory / "nbd.sock").touch()
    linked.symlink_to(other)
    with nbd_server.serve([tmp_path / "a.qcow2"]) as address:
        for directory in (dead, other, address.parent):
            os.utime(directory, (0, 0))
        with nbd_server.serve([tmp_path / "a.qcow2"]) as second:
            assert sorted(temporary.iterdir()) == sorted(
                [young, other, linked, address.parent, second.parent]
            )
            assert address.exists()
    assert sorted(temporary.iterdir()) == sorted([young, other, linked])
    assert (other / "nbd.sock").exists()


def test_a_served_backup_can_not_be_written(two_points):
    builder, _ = two_points
    layers = chain.paths(builder.directory, builder.directory.point(P2), "vda")
    with (
        nbd_server.serve(layers) as address,
        closing(Source.connect([address], nbd_server.EXPORT)) as source,
    ):
        assert source.connections[0].handle.is_read_only()


def test_a_full_target_is_a_write_error_that_says_so(small_file_system):
    path = small_file_system / "a.qcow2"
    create.create_layer(path, 64 << 20, None)
    noise = (bytes([number]) * (1 << 20) for number in range(1, 65))
    with pytest.raises(WriteFailed, match="No space left on device"):
        write_image((path,), [(number << 20, content) for number, content in enumerate(noise)])


def test_a_written_image_is_synced_and_a_read_one_is_not(tmp_path, monkeypatch):
    create.create_layer(tmp_path / "a.qcow2", 65536, None)
    synced = []
    monkeypatch.setattr(
        "backupctl.system.durable.sync_file",
        lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()),
    )
    with nbd_server.serve([tmp_path / "a.qcow2"]):
        pass
    assert synced == []
    with nbd_server.serve([tmp_path / "a.qcow2"], writable=True):
        assert synced == []
    assert synced == [tmp_path / "a.qcow2"]


def test_a_sync_that_fails_is_a_write_error(tmp_path, monkeypatch):
    create.create_layer(tmp_path / "a.qcow2", 65536, None)

    def broken(_path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("backupctl.system.durable.sync_file", broken)
    with (
        pytest.raises(WriteFailed, match="Input/output error"),
        nbd_server.serve([tmp_path / "a.qcow2"], writable=True),
    ):
        pass


# What an image says of itself is not believed.


@pytest.mark.parametrize(
    "backing",
    [
        "/etc/passwd",
        "nbd:localhost:10809",
        'json:{"driver":"nbd","path":"/tmp/x"}',
        f"../{P3}/vda.qcow2",
        "vda.qcow2",
        f"../{P1}/vdb.qcow2",
        f"../../vm1/{P1}/vda.qcow2",
    ],
)
def test_a_foreign_backing_name_is_damage_and_nothing_is_opened(two_points, backing):
    builder, content = two_points
    path = builder.directory.point(P2).path / "vda.qcow2"
    remake(path, len(content), backing)
    with pytest.raises(DamageFound, match="manifest says"):
        chain.paths(builder.directory, builder.directory.point(P2), "vda")


def test_a_lost_backing_link_is_damage(two_points):
    builder, content = two_points
    path = builder.directory.point(P2).path / "vda.qcow2"
    remake(path, len(content), None)
    with pytest.raises(DamageFound, match="manifest says"):
        chain.paths(builder.directory, builder.directory.point(P2), "vda")


def test_a_full_image_with_a_backing_link_is_damage(two_points):
    builder, content = two_points
    remake(builder.directory.point(P1).path / "vda.qcow2", len(content), "/etc/passwd")
    with pytest.raises(DamageFound, match="manifest says"):
        chain.paths(builder.directory, builder.directory.point(P2), "vda")


def test_data_in_another_file_is_damage(two_points, tmp_path):
    builder, content = two_points
    path = builder.directory.point(P1).path / "vda.qcow2"
    path.unlink()
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", path, len(content))
    with pytest.raises(DamageFound, match="features"):
        chain.paths(builder.directory, builder.directory.point(P1), "vda")


@pytest.mark.parametrize("options", ["compat=0.10", "encrypt.format=aes,encrypt.key-secret=s"])
def test_an_image_of_another_make_is_damage(tmp_path, options):
    qemu_img(
        "create", "--object", "secret,id=s,data=x", "-f", "qcow2", "-o", options, tmp_path / "a", 1 << 20
    )
    with pytest.raises(DamageFound):
        qcow2_header.read(tmp_path / "a")


def test_an_image_of_another_size_is_damage(two_points):
    builder, content = two_points
    qemu_img("resize", builder.directory.point(P1).path / "vda.qcow2", len(content) + 512)
    with pytest.raises(DamageFound, match="manifest says"):
        chain.paths(builder.directory, builder.directory.point(P1), "vda")


def test_a_linked_image_is_damage(two_points, tmp_path):
    builder, _ = two_points
    path = builder.directory.point(P1).path / "vda.qcow2"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamageFound):
        chain.paths(builder.directory, builder.directory.point(P1), "vda")


def test_a_missing_image_and_a_missing_parent_are_damage(two_points):
    builder, _ = two_points
    point = builder.directory.point(P2)
    moved = builder.directory.point(P1).path.rename(builder.directory.path / "away")
    with pytest.raises(DamageFound, match="is missing"):
        chain.paths(builder.directory, point, "vda")
    moved.rename(builder.directory.path / P1)
    (builder.directory.path / P1 / "vda.qcow2").unlink()
    with pytest.raises(DamageFound):
        chain.paths(builder.directory, point, "vda")


def test_a_parent_without_the_disk_is_damage(builder: Builder):
    builder.point(P1, (disk_entry("vdb"), []))
    partial = builder.begin(P2)
    create.create_layer(partial.path / "vda.qcow2", 1 << 20, f"../{P1}/vda.qcow2")
    length = (partial.path / "vda.qcow2").stat().st_size
    (partial.path / "vda.digests").write_bytes(b"")
    point = partial.commit(builder.manifest(P2, replace(disk_entry("vda", P1), file_bytes=length)))
    with pytest.raises(DamageFound, match="has no disk"):
        chain.paths(builder.directory, point, "vda")


def test_a_disk_that_the_point_does_not_hold_is_told_with_those_it_holds(two_points):
    builder, _ = two_points
    with pytest.raises(NoSuchPoint, match="its disks: vda"):
        chain.paths(builder.directory, builder.directory.point(P2), "vdz")


def test_a_disk_skips_points_that_left_it_out(builder: Builder):
    builder.point(P1, (disk_entry("vda"), [(0, b"1" * 512)]), (disk_entry("vdb"), []))
    builder.point(P2, (disk_entry("vdb", P1), []))
    point = builder.point(P3, (disk_entry("vda", P1), [(512, b"3" * 512)]))
    layers = chain.paths(builder.directory, point, "vda")
    assert [path.parent.name for path in layers] == [P3, P1]
    assert read_all(layers, 0, 1024) == b"1" * 512 + b"3" * 512


def test_a_grown_disk_reads_zeroes_behind_its_parents_end(builder: Builder):
    builder.point(P1, (disk_entry(size=65536 + 512), [(0, b"1" * (65536 + 512))]))
    point = builder.point(P2, (disk_entry(size=1 << 20, parent=P1), []))
    layers = chain.paths(builder.directory, point, "vda")
    assert read_all(layers, 65536, 1024) == b"1" * 512 + bytes(512)


def test_a_shrunk_disk_ends_where_it_ends(builder: Builder):
    builder.point(P1, (disk_entry(size=1 << 20), [(0, b"1" * (1 << 20))]))
    small = replace(disk_entry(size=65536 + 512), kind="incremental", parent=P1)
    point = builder.point(P2, (small, []))
    layers = chain.paths(builder.directory, point, "vda")
    with nbd_server.serve(layers) as address, closing(Source.connect([address], nbd_server.EXPORT)) as source:
        assert source.size == 65536 + 512


def test_a_header_cut_anywhere_is_damage(tmp_path):
    create.create_layer(tmp_path / "a", 1 << 20, f"../{P1}/vda.qcow2")
    content = (tmp_path / "a").read_bytes()
    needed = content.index(f"../{P1}".encode()) + len(f"../{P1}/vda.qcow2")
    for length in range(needed):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(DamageFound):
            qcow2_header.read(tmp_path / "cut")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.binary(min_size=1, max_size=16))
def test_a_damaged_header_is_damage_and_nothing_worse(tmp_path, place, damage):
    path = tmp_path / "a"
    if not path.exists():
        create.create_layer(path, 1 << 20, f"../{P1}/vda.qcow2")
    content = bytearray(path.read_bytes()[:65536])
    content[place : place + len(damage)] = damage
    (tmp_path / "damaged").write_bytes(content)
    try:
        found = qcow2_header.read(tmp_path / "damaged")
    except DamageFound:
        return
    assert isinstance(found.backing, str)


def test_a_name_stored_in_a_parent_is_not_opened_by_qemu(two_points, tmp_path):
    builder, content = two_points
    layers = chain.paths(builder.directory, builder.directory.point(P2), "vda")
    # Changed after the check: QEMU is still given the chain link by link.
    qemu_img("rebase", "-u", "-F", "raw", "-b", tmp_path / "bait", layers[1])
    assert read_all(layers, 0, len(content)) == content


def test_an_image_cut_at_any_cluster_is_damage_and_not_zeroes(two_points):
    builder, _ = two_points
    path = builder.directory.point(P1).path / "vda.qcow2"
    length = path.stat().st_size
    for shorter in [length - 1, *range(length // 65536 * 65536, -1, -65536)]:
        if shorter < length:
            os.truncate(path, shorter)
            with pytest.raises(DamageFound):
                chain.paths(builder.directory, builder.directory.point(P2), "vda")


def test_writing_one_layer_leaves_its_parents_as_they_were(two_points, tmp_path):
    builder, content = two_points
    parent = builder.directory.point(P1).path / "vda.qcow2"
    before = (parent.read_bytes(), parent.stat().st_mtime_ns)
    path = tmp_path / "vda.qcow2"
    create.create_layer(path, len(content), None)
    write_image((path, parent), [(0, b"z" * 512)])
    assert (parent.read_bytes(), parent.stat().st_mtime_ns) == before
