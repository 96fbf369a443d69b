# SPDX-License-Identifier: GPL-2.0-or-later
"""No name can be turned between our look at a file and the second opening of it, by QEMU or by ourselves.

Whoever owns a directory exchanges what is in it at the worst moment: when all was checked and one of QEMU's
tools is about to be started, or the file is about to be opened once more for direct I/O. Each test tries that
at every such moment.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import BackupctlError, DamageFound, TargetExists, UsageError, WriteFailed
from backupctl.images import create, nbd_server, qcow2_check
from backupctl.images.open_image import OpenImage, named
from backupctl.names import VmName
from backupctl.operations import serve
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.operations.restore import overlay as thin
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.verify import run as verify
from backupctl.operations.verify.layer import VerifyScope
from backupctl.progress import Silent
from backupctl.repository import chain
from backupctl.repository.point import Point
from backupctl.system import qemu_tools, safe_open
from backupctl.system.direct_io import _DirectFile
from backupctl.targets import output
from backupctl.transfer.source import Source
from tests.unit.operations.test_restore_whole import as_raw, run
from tests.unit.points import P1, P2, Builder, disk_entry

MIB = 1 << 20
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="the rule is for root, and takes root to try")


@pytest.fixture
def at_start(monkeypatch) -> Callable[[int, Callable[[], object]], list[int]]:
    """Have something happen before the nth further use of an open file; gives the list of them.

    That is a start of one of QEMU's tools, a check of an image's tables, or an opening for direct I/O.
    """
    real_img, real_start = qemu_tools.img, qemu_tools.start
    real_check, real_open = qcow2_check.check_tables, _DirectFile.__init__

    def arrange(wanted: int, happen: Callable[[], object]) -> list[int]:
        starts: list[int] = []

        def before(real):
            def started(*arguments, **options):
                starts.append(len(starts))
                if len(starts) == wanted + 1:
                    happen()
                return real(*arguments, **options)

            return started

        monkeypatch.setattr(qemu_tools, "img", before(real_img))
        monkeypatch.setattr(qemu_tools, "start", before(real_start))
        monkeypatch.setattr(qcow2_check, "check_tables", before(real_check))
        monkeypatch.setattr(_DirectFile, "__init__", before(real_open))
        return starts

    return arrange


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the host's, which is a qcow2 image as well: QEMU would take it for anything."""
    path = tmp_path / "victim"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True, timeout=30)
    path.write_bytes(path.read_bytes() + b"host" * 1000)
    return path


def temporary_of(target: Path) -> Path:
    """The file that is to become a target."""
    (found,) = target.parent.glob(f".{target.name}.backupctl-restore.*")
    return found


def turn(path: Path, victim: Path) -> None:
    """Put a link to somebody's file in the place of a name."""
    path.rename(path.with_name("moved"))
    path.symlink_to(victim)


def thinly(builder: Builder, point: Point, target: Path) -> None:
    """Make an overlay of a point's only disk."""
    thin.restore(RestoreRequest(directory=builder.directory, point=point.id, to=str(target)), Silent())


@pytest.mark.parametrize(
    ("image_format", "number"), [*product(["raw"], range(3)), *product(["qcow2"], range(4))]
)
def test_a_restore_whose_file_is_exchanged_for_a_link_writes_nothing_elsewhere(
    two_points, tmp_path, at_start, victim, image_format, number
):
    builder, _ = two_points
    target, before = tmp_path / "out" / f"vda.{image_format}", victim.read_bytes()
    target.parent.mkdir()
    starts = at_start(number, lambda: turn(temporary_of(target), victim))
    point = builder.directory.point(P2)
    with pytest.raises(WriteFailed, match="another process replaced"):
        run(point, target)
    assert len(starts) == {"raw": 3, "qcow2": 4}[image_format]  # of each layer, and of what is written
    assert victim.read_bytes() == before
    assert not os.path.lexists(target)


def test_a_thin_restore_whose_file_is_exchanged_for_a_link_writes_nothing_elsewhere(
    two_points, tmp_path, at_start, victim
):
    builder, _ = two_points
    target, before = tmp_path / "out" / "vda.qcow2", victim.read_bytes()
    target.parent.mkdir()
    at_start(0, lambda: turn(temporary_of(target), victim))
    with pytest.raises(WriteFailed, match="another process replaced"):
        thinly(builder, builder.directory.point(P2), target)
    assert victim.read_bytes() == before
    assert not os.path.lexists(target)


@pytest.mark.parametrize("force", [False, True])
def test_a_link_that_comes_to_stand_at_the_target_is_not_followed(tmp_path, victim, force):
    target, before = tmp_path / "out.raw", victim.read_bytes()
    with suppress(TargetExists), output.file(target, force=force) as image:
        os.pwrite(image.descriptor, b"restored", 0)
        target.symlink_to(victim)
    assert victim.read_bytes() == before
    assert target.is_symlink() != force


def test_an_image_that_is_being_made_is_written_nowhere_else(tmp_path, at_start, victim):
    path, before = tmp_path / "vda.qcow2", victim.read_bytes()
    with create.new_layer(path, MIB, None) as image:
        assert image.header().size == MIB
        assert image.stat().st_mode & 0o777 == 0o600
    path.unlink()
    at_start(0, lambda: turn(path, victim))
    create.create_layer(path, MIB, f"../{P1}/vda.qcow2")
    assert victim.read_bytes() == before
    assert (tmp_path / "moved").stat().st_size > CLUSTER_BYTES


def test_a_link_in_the_place_of_a_new_image_is_not_followed(tmp_path, victim):
    before = victim.read_bytes()
    (tmp_path / "vda.qcow2").symlink_to(victim)
    with pytest.raises(WriteFailed, match="File exists"):
        create.create_layer(tmp_path / "vda.qcow2", MIB, None)
    assert victim.read_bytes() == before


def test_an_image_that_is_being_resized_is_the_one_that_was_opened(tmp_path, at_start, victim):
    path, before = tmp_path / "vda.qcow2", victim.read_bytes()
    create.create_layer(path, MIB, None)
    at_start(0, lambda: turn(path, victim))
    with OpenImage.open(path, writable=True) as image:
        create.resize(image, 3 * MIB)
        assert image.header().size == 3 * MIB
    assert victim.read_bytes() == before


@pytest.mark.parametrize("place", ["link", "other file"])
@pytest.mark.parametrize("point", [P1, P2])
@pytest.mark.parametrize("number", range(3))
def test_a_layer_that_is_exchanged_after_its_check_is_not_what_is_restored(
    two_points, tmp_path, at_start, victim, number, point, place
):
    builder, content = two_points
    image = builder.directory.path / point / "vda.qcow2"

    def exchange() -> None:
        if place == "link":
            turn(image, victim)
        else:
            victim.rename(image)

    starts = at_start(number, exchange)
    run(builder.directory.point(P2), tmp_path / "out.raw")
    assert len(starts) == 3
    assert (tmp_path / "out.raw").read_bytes() == content


def test_a_layer_that_was_exchanged_before_it_is_opened_is_checked_as_it_is_then(two_points, victim):
    builder, _ = two_points
    layers = chain.layers(builder.directory, builder.directory.point(P2), "vda")
    turn(layers[1].path, victim)
    with pytest.raises(DamageFound, match="cannot open"), chain.opened(layers):
        raise AssertionError
    layers[1].path.unlink()
    victim.rename(layers[1].path)
    with pytest.raises(DamageFound), chain.opened(layers):
        raise AssertionError


def test_a_verify_proves_the_image_that_it_opened(two_points, at_start):
    """A broken copy takes the name between the check of the header, that of the tables, and the reading."""
    builder, _ = two_points
    image = builder.directory.path / P1 / "vda.qcow2"
    real = image.read_bytes()
    for number in range(4):
        other = image.with_name(".other")
        other.write_bytes(real[:CLUSTER_BYTES] + bytes(len(real) - CLUSTER_BYTES))
        starts = at_start(number, lambda other=other: other.rename(image))
        report = verify.verify(
            builder.repository, VmName("vm1"), None, VerifyScope(), Silent(), Cancellation()
        )
        assert len(starts) == 4
        # The first two starts are of the first layer's proof. After them the exchange is there to be found.
        assert [found.path for found in report.damage if number < 2] == []
        other.write_bytes(real)
        other.rename(image)


def test_what_is_served_is_what_was_checked(two_points, at_start, victim):
    builder, content = two_points
    stop, found = Cancellation(), []

    def ready(exports: tuple[serve.Export, ...]) -> None:
        address = Path(exports[0].uri.partition("?socket=")[2])
        with closing(Source.connect([address], exports[0].disk)) as source:
            found.append(bytes(source.connections[0].handle.pread(len(content), 0)))
        stop.request("SIGTERM")

    at_start(0, lambda: turn(builder.directory.path / P1 / "vda.qcow2", victim))
    request = serve.ServeRequest(builder.directory.point(P2))
    serve.serve(builder.directory, request, ready=ready, stop=stop)
    assert found == [content]


def test_an_overlay_that_is_exchanged_after_its_check_is_not_written(two_points, tmp_path, at_start, victim):
    builder, _ = two_points
    overlay, before, stop = tmp_path / "out" / "overlay.qcow2", victim.read_bytes(), Cancellation()
    overlay.parent.mkdir()

    def ready(exports: tuple[serve.Export, ...]) -> None:
        address = Path(exports[0].uri.partition("?socket=")[2])
        with closing(Source.connect([address], exports[0].disk)) as source:
            source.connections[0].handle.pwrite(b"written" * 100, 0)
        stop.request("SIGTERM")

    at_start(1, lambda: turn(overlay, victim))  # the first one makes it
    request = serve.ServeRequest(builder.directory.point(P2), writable_overlay=overlay)
    serve.serve(builder.directory, request, ready=ready, stop=stop)
    assert victim.read_bytes() == before
    assert b"written" in (overlay.parent / "moved").read_bytes()


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("grown", [False, True])
def test_a_merge_writes_into_no_image_but_the_one_that_it_checked(
    builder: Builder, at_start, victim, number, grown
):
    entry = disk_entry()
    builder.point(P1, (entry, [(0, b"a" * MIB)]))
    size = 2 * MIB if grown else MIB
    upper = replace(entry, kind="incremental", parent=P1, size=size)
    builder.point(P2, (upper, [(0, b"b" * CLUSTER_BYTES), (size - CLUSTER_BYTES, b"c" * CLUSTER_BYTES)]))
    before, lower = victim.read_bytes(), builder.directory.path / P1 / "vda.qcow2"
    starts = at_start(number, lambda: turn(lower, victim) if lower.exists() else None)
    with suppress(BackupctlError, OSError):
        prune.prune(builder.directory, Rules(last=1), Silent(), Cancellation())
    assert starts
    assert victim.read_bytes() == before


@root_only
@pytest.mark.parametrize(
    "restored", [lambda _builder, point, to: run(point, to), thinly], ids=["whole", "thin"]
)
def test_root_restores_into_no_directory_that_somebody_else_could_turn(two_points, tmp_path, restored):
    builder, _ = two_points
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, NOBODY, NOBODY)
    point = builder.directory.point(P2)
    with pytest.raises(UsageError, match="not safe for root") as caught:
        restored(builder, point, out / "vda.qcow2")
    assert "--to /srv/restored/vda." in caught.value.hint
    assert list(out.iterdir()) == []


@root_only
def test_a_directory_that_is_turned_after_the_first_look_is_refused_before_a_file_is_made(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    with pytest.raises(UsageError, match="others may write"), output.file(out / "vda.raw", force=False):
        raise AssertionError
    assert list(out.iterdir()) == []


def test_what_qemu_says_of_a_descriptor_is_told_by_its_name(tmp_path):
    create.create_layer(tmp_path / "a.qcow2", MIB, None)
    with OpenImage.open(tmp_path / "a.qcow2") as image:
        said = f"Could not open '{image.name}', '{image.name}0'"
        assert named(said, [image]) == f"Could not open '{tmp_path}/a.qcow2', '{image.name}0'"


def test_only_a_plain_file_is_opened(tmp_path, victim):
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "absent", "."):
        for writable in (False, True):
            with pytest.raises(safe_open.NotThere):
                OpenImage.open(tmp_path / name, writable=writable)


def test_an_image_in_use_is_told_by_its_name_and_is_locked_for_others(tmp_path):
    path = tmp_path / "a.qcow2"
    create.create_layer(path, MIB, None)
    with nbd_server.serve([path], writable=True):
        done = subprocess.run(["qemu-img", "info", path], capture_output=True, timeout=30, check=False)
        assert b"Failed to get shared" in done.stderr
        with (
            pytest.raises(BackupctlError, match=str(path)),
            nbd_server.serve([path], writable=True),
        ):
            raise AssertionError
    shutil.copyfile(path, tmp_path / "copy")
    assert not any(as_raw(tmp_path / "copy"))
