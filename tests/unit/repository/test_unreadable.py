# SPDX-License-Identifier: GPL-2.0-or-later
"""What can't be read is not damaged: each error of the operating system, at each file that is read."""

import errno
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from backupctl.cancel import Cancellation
from backupctl.cli.main import cli
from backupctl.digests import digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, RECORD
from backupctl.digests.digest_map import DigestMap, Named
from backupctl.errors import DamageFound, Interrupted, NeedsRecovery, RepositoryUnreadable
from backupctl.names import DiskName
from backupctl.operations.recover import recover
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import restore
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import VerifyReport, verify
from backupctl.options import QmpAccess, VmConfig
from backupctl.progress import Silent
from backupctl.repository.checked_chains import CheckedChains
from backupctl.system.address import Address
from backupctl.system.direct_io import DirectReader
from backupctl.vm.qmp.monitor import Monitor
from tests.unit.points import P1, P2, P3, Builder

ERRORS = (errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT, errno.ENOMEM, errno.EPERM, errno.EMFILE)
VDA = DiskName("vda")
Spoil = Callable[..., None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Has every open of a file or directory fail from now on whose path ends like that."""
    real = os.open

    def now(ending: str, number: int = errno.EIO) -> None:
        def failing(path, *arguments, **options):
            if str(path).endswith(ending):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, "open", failing)

    return now


def verified(builder: Builder, **depth: object) -> VerifyReport:
    return verify(builder.repository, None, None, VerifyScope(**depth), Silent(), Cancellation())  # type: ignore[arg-type]


def restored(builder: Builder, to: Path, *, allow_damage: bool = False) -> None:
    request = RestoreRequest(
        directory=builder.directory, point=P2, to=str(to), image_format="raw", allow_damage=allow_damage
    )
    restore(request, Silent(), Cancellation())


@pytest.mark.parametrize("name", ["vda.digests", "vda.qcow2", "manifest.json"])
def test_a_chain_that_can_not_be_read_is_not_taken_for_damaged(two_points, spoil, name):
    """Damaged it would be begun anew: a silent full each night that the network has a hiccup."""
    builder, _ = two_points
    for number in ERRORS:
        spoil(f"{P1}/{name}", number)
        with pytest.raises(RepositoryUnreadable, match=os.strerror(number)) as told:
            CheckedChains(builder.directory).error(P2, VDA)
        assert told.value.exit_code == 1


def test_an_error_in_the_middle_of_a_file_is_none_of_its_bytes(two_points, monkeypatch):
    builder, _ = two_points
    real = os.fdopen

    class Failing:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def read(self, _length):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdopen", lambda *arguments: Failing(real(*arguments)))
    with pytest.raises(RepositoryUnreadable, match="Input/output error"):
        builder.directory.scan_points()
    with pytest.raises(RepositoryUnreadable):
        DigestMap.open(builder.directory.path / P1 / "vda.digests")


@pytest.mark.parametrize("name", ["vda.digests", "vda.qcow2", "manifest.json", ""])
def test_verify_tells_what_could_not_be_checked_and_calls_nothing_damaged(two_points, spoil, name):
    builder, _ = two_points
    spoil(f"{P1}/{name}" if name else P1, errno.EACCES)
    report = verified(builder, data=False)
    assert report.damage == ()
    assert {P1 in str(one.path) for one in report.unchecked} == {True}
    assert all("Permission denied" in one.message for one in report.unchecked)


def test_the_exit_code_of_what_could_not_be_checked_is_1_and_damage_elsewhere_wins(two_points, spoil):
    builder, _ = two_points
    call = ["verify", "--fast", "--repository", str(builder.repository.path)]
    spoil(f"{P1}/vda.digests", errno.ESTALE)
    done = CliRunner().invoke(cli, call)
    assert isinstance(done.exception, RepositoryUnreadable)
    assert "NOT CHECKED: " in done.output
    assert "no damage, 1 not checked" in done.output
    with (builder.directory.path / P2 / "vda.digests").open("r+b") as file:
        file.write(b"X")
    done = CliRunner().invoke(cli, [*call, "--json"])
    assert isinstance(done.exception, DamageFound)
    assert '"unchecked": [\n' in done.output


def test_a_point_asked_for_says_what_below_it_could_not_be_checked(two_points, spoil):
    builder, _ = two_points
    spoil(f"{P1}/manifest.json", errno.ETIMEDOUT)
    report = verify(
        builder.repository, builder.directory.name, P2, VerifyScope(data=False), Silent(), Cancellation()
    )
    assert (report.damage, len(report.unchecked)) == ((), 1)


def test_a_disk_that_fails_is_told_from_tables_that_lead_nowhere(two_points, tmp_path, monkeypatch):
    builder, content = two_points
    image = builder.directory.path / P1 / "vda.qcow2"
    sound = image.read_bytes()
    damaged = bytearray(sound)
    (first,) = struct.unpack_from(">Q", damaged, 40)
    second = struct.unpack_from(">Q", damaged, first)[0] & (1 << 56) - 512
    damaged[second + 8 * 4 + 6] ^= 2  # of the last cluster; now between two clusters, which QEMU refuses
    image.write_bytes(damaged)
    assert {damage.kind for damage in verified(builder).damage} == {"image", "data"}
    with pytest.raises(DamageFound):
        restored(builder, tmp_path / "out.raw")
    image.write_bytes(sound)
    real = DirectReader.read

    def failing(reader: DirectReader, parts: Sequence[memoryview], offset: int) -> int:
        if offset <= sound.index(b"tail") < offset + sum(part.nbytes for part in parts):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(reader, parts, offset)

    monkeypatch.setattr(DirectReader, "read", failing)
    report = verified(builder)
    assert (report.damage, [one.path for one in report.unchecked]) == ((), [image])
    with pytest.raises(RepositoryUnreadable, match="Input/output"):
        restored(builder, tmp_path / "out.raw")
    assert not (tmp_path / "out.raw").exists()
    restored(builder, tmp_path / "out.raw", allow_damage=True)
    assert (tmp_path / "out.raw").read_bytes() == content[: 4 * CLUSTER_BYTES].ljust(len(content), b"\0")


def test_a_restore_is_refused_by_an_unreadable_map_and_let_through_by_force(two_points, spoil, tmp_path):
    builder, content = two_points
    spoil(f"{P1}/vda.digests", errno.EIO)
    with pytest.raises(RepositoryUnreadable, match="Input/output"):
        restored(builder, tmp_path / "out.raw")
    assert list(tmp_path.glob("*.raw")) == []
    restored(builder, tmp_path / "out.raw", allow_damage=True)
    assert (tmp_path / "out.raw").read_bytes() == content


def test_a_journal_that_can_not_be_read_is_not_taken_for_none(two_points, tmp_path, spoil, monkeypatch):
    """It alone tells that a dead run froze the guest; without it recover would drop all that is left."""
    builder, _ = two_points
    partial = builder.begin(P3)
    spoil("run.json")
    with pytest.raises(RepositoryUnreadable):
        partial.journal()
    monkeypatch.setattr(Monitor, "connect", lambda *_: nullcontext())
    vm = VmConfig(builder.directory.name, QmpAccess(Address(path="/nowhere")))
    with pytest.raises(NeedsRecovery, match=r"cannot read .*run\.json"):
        recover(vm, builder.repository, Silent(), Cancellation(), tmp_path)
    assert partial.path.exists()


def _map_of(path: Path, *numbers: int, size: int = 100 * CLUSTER_BYTES) -> str:
    return digest_map.write(path, size, np.array([(number, 1, 2) for number in numbers], RECORD))


@pytest.mark.parametrize("refused", [(mmap.ACCESS_READ,), (mmap.ACCESS_READ, mmap.ACCESS_COPY)])
def test_a_map_is_read_where_it_can_not_be_mapped(tmp_path, monkeypatch, refused):
    _map_of(tmp_path / "vda.digests", 0, 5, 99)
    real = mmap.mmap

    def mapped(*arguments, access):
        if access in refused:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real(*arguments, access=access)

    monkeypatch.setattr(mmap, "mmap", mapped)
    found = DigestMap.open(tmp_path / "vda.digests").records
    assert found["cluster"].tolist() == [0, 5, 99]
    assert not found.flags.writeable


def test_a_huge_map_is_refused_by_its_length_before_any_of_it_is_read(tmp_path, monkeypatch):
    """Sparse, it costs nobody anything; hashed it would keep us busy, and deaf, for minutes."""
    monkeypatch.setattr(digest_map, "_check_records", pytest.fail)
    path, records = tmp_path / "vda.digests", 1 << 37
    for size in (100 * CLUSTER_BYTES, records * CLUSTER_BYTES):
        path.write_bytes(
            struct.pack("<8sIIQQ", b"bkdigest", 1, CLUSTER_BYTES, size, records).ljust(64, b"\0")
        )
        os.truncate(path, 64 + (1 << 42))
        for named in (None, Named(100 * CLUSTER_BYTES, "0" * 32)):
            with pytest.raises(DamageFound):
                DigestMap.open(path, named)


def test_a_request_to_stop_ends_the_reading_of_a_map(tmp_path, monkeypatch):
    monkeypatch.setattr(digest_map, "_PIECE_RECORDS", 1)
    _map_of(tmp_path / "vda.digests", 0, 5, 99)
    stop = Cancellation()
    looked = []

    def check() -> None:
        looked.append(stop.check())
        stop.request("SIGTERM")

    with pytest.raises(Interrupted):
        DigestMap.open(tmp_path / "vda.digests", check=check)
    assert len(looked) == 1


def test_a_point_that_can_not_be_read_hides_no_other_from_the_list(two_points, spoil):
    builder, _ = two_points
    spoil(f"{P2}/manifest.json", errno.EACCES)
    done = CliRunner().invoke(cli, ["list", "--repository", str(builder.repository.path)])
    assert isinstance(done.exception, RepositoryUnreadable)
    assert P1 in done.output
