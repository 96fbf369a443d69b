# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of a VM that is off, of which others keep us from writing, or from a backup. No QEMU is run."""

import os
from types import SimpleNamespace

import pytest

from backupctl.errors import CommandFailed, Locked, Refused
from backupctl.names import DiskName, VmName
from backupctl.system import image_lock
from backupctl.vm.offline import claim, daemon, images
from backupctl.vm.offline.daemon import Daemon
from backupctl.vm.offline.driver import OfflineDriver
from tests.unit.vm.test_offline_images import image, qcow2

NO_LOCK = 'Failed to get "write" lock'


class Monitor:
    """A monitor that refuses with each of these texts, then obeys."""

    version = "7.2.22"

    def __init__(self, *refusals: str) -> None:
        self.refusals = list(refusals)
        self.modes: list[bool] = []

    def execute(self, command: str, arguments) -> None:
        if self.refusals:
            raise CommandFailed(command, "GenericError", self.refusals.pop(0))
        self.modes.append(arguments["options"][0]["read-only"])


class Host(SimpleNamespace):
    """Another host, whose images can be written to unless `unwritable` says why not."""

    name, unwritable = "vmhost", ""

    def refuse_unwritable(self) -> None:
        if self.unwritable:
            raise Refused(self.unwritable, hint="setfacl")


@pytest.fixture
def disks(tmp_path):
    with images.opened([image((qcow2(tmp_path / "vda"), "qcow2"))]) as opened:
        yield opened


def on(disks, *refusals: str, unwritable: str = "") -> Daemon:
    made = Daemon(Host(disks=disks, unwritable=unwritable), 1.0, None)
    made._monitor = Monitor(*refusals)
    return made


def test_a_reader_that_ends_soon_is_waited_for(disks, monkeypatch):
    monkeypatch.setattr(daemon, "_AGAIN_SECONDS", 0.01)
    made = on(disks, NO_LOCK, NO_LOCK)
    with made.writable():
        assert made.monitor.modes == [False]
    assert made.monitor.modes == [False, True]


def test_a_reader_that_stays_is_an_error_that_says_what_to_do(disks, monkeypatch):
    monkeypatch.setattr(daemon, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(CommandFailed) as refused, on(disks, NO_LOCK, NO_LOCK).writable():
        pass
    assert refused.value.message == f"on vmhost: an image is in use by another process: {NO_LOCK}"
    assert "qemu-nbd" in refused.value.hint


def test_a_right_that_is_missing_is_named_instead_of_a_descriptor(disks):
    text = f"Could not reopen file: {disks[0].files[0].image.name}: Permission denied"
    with pytest.raises(CommandFailed) as refused, on(disks, text, unwritable="cannot write").writable():
        pass
    assert (refused.value.message, refused.value.hint) == ("cannot write", "setfacl")
    with pytest.raises(CommandFailed) as refused, on(disks, text).writable():
        pass
    path = disks[0].path
    assert refused.value.message == (
        f"on vmhost: QEMU cannot write to an image: Could not reopen file: {path}: Permission denied"
    )


def test_doctor_reports_an_image_that_cannot_be_written_to(disks):
    driver = OfflineDriver(VmName("web"), on(disks, unwritable="cannot write to vda"), "web is off")
    found = [one for one in driver.findings(None) if one.verdict == "bad"]
    assert [(one.subject, one.said, one.advice) for one in found] == [
        ("image", "cannot write to vda", "setfacl")
    ]


def test_a_second_backup_waits_for_the_end_of_the_first_and_is_refused_if_there_is_none(disks, monkeypatch):
    other = os.open(disks[0].path, os.O_RDONLY)
    assert image_lock.claim(other)
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(Locked, match=f"another backup of {disks[0].path} is under way"):
        claim.claim(disks)
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(claim.time, "sleep", lambda _: os.close(other))
    claim.claim(disks)


def test_a_raw_image_which_stores_nothing_may_be_read_by_two_backups(tmp_path):
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(512))
    with images.opened([image((raw, "raw"))]) as first, images.opened([image((raw, "raw"))]) as second:
        claim.claim(first)
        claim.claim(second)
    assert first[0].disk == DiskName("vda")
