# SPDX-License-Identifier: GPL-2.0-or-later
"""A repository that somebody else has had in hand: nothing is read or written outside, nothing hangs."""

import itertools
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backupctl.names import point_id
from backupctl.repository import strict_json

ESCAPES = "\x1b[2J\x1b[31mred\r\n\u202egnp"
COMMANDS = (
    ("list",),
    ("show", "web", "latest"),
    ("status", "web"),
    ("verify", "web"),
    ("prune", "web", "--keep-last", "1", "--dry-run"),
)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def pipe_that_somebody_holds(path: Path) -> None:
    """Nothing comes out of it, and no end either."""
    pipe(path)
    os.open(path, os.O_RDWR | os.O_CLOEXEC)  # closed with the test's process


def listening_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{directory}/{path.name}")
    os.close(directory)


def zeroes_without_end(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def link_to_outside(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/passwd")


def link_to_itself(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def gigabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def missing(path: Path) -> None:
    path.unlink()


def deep(path: Path) -> None:
    path.write_bytes(b'{"format": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def deep_but_legal(path: Path) -> None:
    path.write_bytes(b'{"checksum": "", "x": ' + b"[" * 940 + b"]" * 940 + b"}")


def many_digits(path: Path) -> None:
    path.write_bytes(b'{"format": ' + b"9" * 5000 + b"}")


def as_much_as_may_be(path: Path) -> None:
    path.write_bytes(b"[" + b"{}," * 1_300_000 + b"{}]")


def escapes(path: Path) -> None:
    path.write_bytes(json.dumps({"format": 1, ESCAPES: ESCAPES}).encode())


FILES = [
    *(pipe, pipe_that_somebody_holds, listening_socket, zeroes_without_end, directory, link_to_outside),
    *(link_to_itself, gigabyte, cut, empty, missing, deep, deep_but_legal, many_digits),
    *(as_much_as_may_be, escapes),
]


@pytest.fixture
def point(victim, tmp_path):
    """The newest point; what a test does to the repository is taken back."""
    newest = json.loads(victim.run("show", "web", "latest", "--json", vm=False).out)
    shutil.copytree(victim.repository, tmp_path / "kept", symlinks=True)
    yield Path(newest["path"])
    shutil.rmtree(victim.repository)
    shutil.copytree(tmp_path / "kept", victim.repository, symlinks=True)
    victim.recovers(at_rest=False)  # the VM's bitmaps are of what was taken back


def every_command(victim, allowed: set[int]) -> None:
    for command in COMMANDS:
        spoken = victim.run(*command, vm=command[0] == "status")
        assert spoken.code in allowed, spoken


@pytest.mark.parametrize("spoil", FILES)
@pytest.mark.parametrize("name", ["manifest.json", "vda.qcow2", "vda.digests"])
def test_a_point_whose_file_is_something_else_is_damage_or_not_needed(victim, point, name, spoil):
    spoil(point / name)
    shown = victim.run("restore", "web", point.name, "--to", str(victim.directory / "x.raw"), vm=False)
    assert shown.code == 4, shown
    assert not (victim.directory / "x.raw").exists()
    if name == "manifest.json":
        every_command(victim, {0, 4})
    done = victim.run("incremental", "web", "--json")
    assert done.code == 4, "a full, or a scan on an older point, can always be had; the damage is told"
    assert json.loads(done.out)["point"] > point.name


@pytest.mark.parametrize("spoil", FILES)
def test_a_repository_file_that_is_something_else_is_told(victim, point, spoil):
    spoil(victim.repository / "repository.json")
    every_command(victim, {1, 2, 4})
    assert victim.run("incremental", "web").code in (1, 2, 4)


@pytest.mark.parametrize("spoil", FILES)
def test_a_journal_that_is_something_else_is_not_believed_and_cleared_away(victim, point, spoil):
    partial = point.parent / "20990101T000000Z.partial"
    partial.mkdir()
    (partial / "run.json").write_text("{}")
    spoil(partial / "run.json")
    assert victim.run("status", "web").code == 0
    assert victim.run("incremental", "web").code == 0
    assert not partial.exists()


def test_a_linked_vm_directory_leads_nowhere(victim, point):
    outside = victim.outside
    (victim.repository / "other").symlink_to(outside)
    for command in ("list", "restore", "full", "incremental", "recover", "status"):
        arguments = ["--to", "-"] if command == "restore" else []
        done = victim.run(command, "other", *arguments, vm=command not in ("list", "restore"))
        assert done.code in (1, 2), done


def test_a_linked_point_is_none(victim, point, tmp_path):
    shutil.move(point, tmp_path / "elsewhere")
    point.symlink_to(tmp_path / "elsewhere")
    assert victim.run("restore", "web", point.name, "--to", "-", vm=False).code == 2
    every_command(victim, {0, 2, 4})
    assert victim.run("incremental", "web").code == 0


def test_a_linked_partial_point_is_not_followed(victim, point):
    (point.parent / "20990101T000000Z.partial").symlink_to(victim.outside)
    assert victim.run("recover", "web").code == 0
    assert victim.run("incremental", "web").code in (0, 1)


@pytest.mark.parametrize("name", ["99991231T235959Z", "99991231T235959Z.partial", "00010101T000000Z"])
def test_a_point_at_the_end_of_time_does_not_break_anything(victim, point, name):
    (point.parent / name).mkdir()
    every_command(victim, {0, 4})
    done = victim.run("incremental", "web", "--json")
    assert done.code in (0, 1, 4), done


@pytest.mark.parametrize("spoil", [pipe, directory, link_to_outside, zeroes_without_end])
def test_a_lock_that_is_something_else_is_told(victim, point, spoil):
    (point.parent / "lock").unlink()
    spoil(point.parent / "lock")
    assert victim.run("incremental", "web").code in (0, 1, 75)


BACKING = [
    "/etc/passwd",
    'json:{"driver": "file", "filename": "/etc/passwd"}',
    "nbd:unix:/run/evil.sock",
    "nbd://evil.example/x",
    "../../../../../../../../etc/passwd",
    "http://evil.example/x.qcow2",
    "fat:rw:/etc",
    ESCAPES,
    "",
]


def backed(path: Path, name: bytes) -> None:
    content = bytearray(path.read_bytes()[:65536])
    struct.pack_into(">QI", content, 8, 1024, len(name))
    content[1024 : 1024 + len(name)] = name
    with path.open("r+b") as file:
        file.write(content)


def patched(at: int, form: str, *values: int) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(struct.pack(form, *values))

    return patch


def external_data_file(path: Path) -> None:
    patched(72, ">Q", 4)(path)
    patched(112, ">II", 0x44415441, 12)(path)
    with path.open("r+b") as file:
        file.seek(120)
        file.write(b"/etc/passwd\0")


HEADERS = {
    **{f"backing {name!r:.40}": lambda path, name=name: backed(path, name.encode()) for name in BACKING},
    "backing name behind the end": patched(8, ">QI", 1 << 62, 20),
    "backing name without end": patched(8, ">QI", 1024, 0xFFFFFFFF),
    "external data file": external_data_file,
    "data in another file by flag only": patched(72, ">Q", 4),
    "marked corrupt": patched(72, ">Q", 2),
    "all features": patched(72, ">Q", (1 << 64) - 1),
    "encrypted": patched(32, ">I", 2),
    "a million snapshots": patched(60, ">IQ", 1_000_000, 65536),
    "first table of gigabytes": patched(36, ">I", 0xFFFFFFFF),
    "first table elsewhere": patched(40, ">Q", 1 << 62),
    "first table on itself": patched(40, ">Q", 0),
    "reference table of gigabytes": patched(56, ">I", 0xFFFFFFFF),
    "reference table elsewhere": patched(48, ">Q", (1 << 64) - 512),
    "huge size": patched(24, ">Q", (1 << 64) - 1),
    "clusters of 2 ** 63": patched(20, ">I", 63),
    "clusters of one byte": patched(20, ">I", 0),
    "header without end": patched(100, ">I", 0xFFFFFFFF),
    "extension without end": patched(104, ">II", 0xE2792ACA, 0xFFFFFFFF),
    "version 2": patched(4, ">I", 2),
    "not qcow2": patched(0, ">I", 0x7F454C46),
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_image_that_leads_elsewhere_is_damage_and_opens_nothing(victim, point, name, tmp_path):
    HEADERS[name](point / "vda.qcow2")
    target = tmp_path / "x.raw"
    done = victim.run("restore", "web", point.name, "--to", str(target), vm=False)
    if "table" in name and done.code == 0:  # a layer that stores nothing has no use for its table
        assert target.read_bytes() == victim.vm.content("vda")
        return
    assert done.code in ((1, 4) if "table" in name else (4,)), done  # 1: QEMU won't open it
    assert not target.exists()


def forged(path: Path, **changes: object) -> None:
    document = json.loads(path.read_bytes())
    document.pop("checksum")
    document |= changes
    document["checksum"] = strict_json.checksum(document)
    path.write_text(json.dumps(document))


def test_a_forged_manifest_with_a_true_checksum_leads_nowhere(victim, point):
    path = point / "manifest.json"
    entry = json.loads(path.read_bytes())["disks"][0]
    changes: tuple[dict[str, object], ...] = (
        {"name": "../../../etc/x"},
        {"name": ESCAPES},
        {"node": ESCAPES},
        {"size": 1 << 60},
        {"size": 1 << 61},
        {"size": 10**4000},
        {"file_bytes": 0},
        {"parent": "../../x"},
        {"parent": "99991231T235959Z"},
        {"digests": "/etc/passwd"},
        {"reason": "x" * 5000},
    )
    for changed, command in zip(changes, itertools.cycle(COMMANDS), strict=False):
        forged(path, disks=[{**entry, **changed}])
        done = victim.run("restore", "web", point.name, "--to", "-", vm=False)
        assert done.code in (0 if "node" in changed else 4, 2), (changed, done)
        spoken = victim.run(*command, vm=command[0] == "status")
        assert spoken.code in {0, 2, 4}, (changed, spoken)


def test_a_chain_without_end_is_damage_and_no_recursion(victim, point):
    """Far more layers than QEMU opens: said in words, in time."""
    path = point / "manifest.json"
    first = json.loads(path.read_bytes())
    entry = first["disks"][0]
    if entry["parent"] is None:
        entry["kind"] = "incremental"
    image = (point / "vda.qcow2").read_bytes()[:65536]
    begin = datetime(2020, 1, 1, tzinfo=UTC)
    ids = [point_id(f"{begin + timedelta(hours=number):%Y%m%dT%H%M%SZ}") for number in range(700)]
    for below, this in zip([None, *ids], ids, strict=False):
        made = point.parent / this
        made.mkdir()
        kind = "incremental" if below else "full"
        disk = {**entry, "kind": kind, "parent": below, "file_bytes": 65536}
        (made / "manifest.json").write_text(json.dumps(first))
        forged(made / "manifest.json", point=this, parent=below, kind=kind, disks=[disk])
        (made / "vda.qcow2").write_bytes(image)
        backed(made / "vda.qcow2", f"../{below}/vda.qcow2".encode())
        if not below:
            patched(8, ">QI", 0, 0)(made / "vda.qcow2")
    done = victim.run("restore", "web", ids[-1], "--to", "-", vm=False)
    assert done.code == 4, done
    assert "500 layers" in done.err
