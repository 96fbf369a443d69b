# SPDX-License-Identifier: GPL-2.0-or-later
"""Which driver a VM gets: by its monitor, by its images, or none."""

import socket
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from backupctl.errors import MonitorUnreachable, VmIsOff
from backupctl.names import DiskName, VmName
from backupctl.options import ImageFile, LibvirtAccess, NoMonitor, QmpAccess, Timeouts, VmConfig, VmImage
from backupctl.system.address import Address
from backupctl.vm import open_driver
from backupctl.vm.offline import driver
from backupctl.vm.open_driver import open_for_backup, refuse_skipped
from backupctl.vm.remote import libvirt_driver, off_driver

TIMEOUTS = Timeouts(command_seconds=0.3)
IMAGES = (VmImage(DiskName("vda"), (ImageFile(Path("/nowhere")),)),)


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> list:
    """Stand in for the driver of images; returns the images of each connection."""
    asked: list = []

    @contextmanager
    def connect(vm, why_off, timeouts, cancel=None):
        asked.append((vm.images, why_off))
        yield "the images"

    monkeypatch.setattr(driver, "connect", connect)
    return asked


@pytest.fixture
def refusing(tmp_path) -> Address:
    """A socket that exists, and on which nobody listens."""
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    return Address(path=str(path))


@pytest.fixture
def silent(tmp_path):
    """A socket on which somebody listens and says nothing."""
    path = tmp_path / "silent"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        one.listen()
        yield Address(path=str(path))


def vm(address: Address | None, **more) -> VmConfig:
    return VmConfig(VmName("web"), QmpAccess(address) if address else NoMonitor(), **more)


def opened(config: VmConfig) -> object:
    with open_for_backup(config, TIMEOUTS) as found:
        return found


@pytest.mark.parametrize("which", ["missing", "refusing"])
def test_a_vm_that_is_off_is_backed_up_by_its_images(refusing, which, offline):
    address = refusing if which == "refusing" else Address(path="/nowhere/qmp")
    assert opened(vm(address, images=IMAGES)) == "the images"
    ((images, why),) = offline
    assert images == IMAGES
    assert str(address.path) in why


def test_a_monitor_that_is_silent_is_never_taken_for_a_vm_that_is_off(silent, offline):
    for when_off in (None, "skip", "backup"):
        with pytest.raises(MonitorUnreachable, match="does not answer"):
            opened(vm(silent, images=IMAGES, when_off=when_off))
    assert offline == []


def test_a_vm_that_is_off_fails_without_images(refusing):
    with pytest.raises(MonitorUnreachable) as raised:
        opened(vm(refusing))
    assert "--image" in raised.value.hint


def test_a_vm_that_must_run_fails_though_there_are_images(refusing, offline):
    with pytest.raises(MonitorUnreachable):
        opened(vm(refusing, images=IMAGES, when_off="fail"))
    assert offline == []


def test_a_vm_that_is_skipped_needs_no_images(refusing, offline):
    for images in ((), IMAGES):
        with pytest.raises(VmIsOff, match="so it was skipped"):
            opened(vm(refusing, images=images, when_off="skip"))
        with pytest.raises(VmIsOff):
            refuse_skipped(vm(refusing, images=images, when_off="skip"), TIMEOUTS)
    refuse_skipped(vm(refusing, images=IMAGES), TIMEOUTS)
    assert offline == []


def test_a_command_that_only_looks_reads_the_images_whatever_a_backup_does(refusing):
    for when_off in ("skip", "fail"):
        with open_driver.open_driver(
            vm(refusing, images=IMAGES, when_off=when_off), TIMEOUTS
        ) as opened_driver:
            assert opened_driver == "the images"


@pytest.mark.parametrize("access", [NoMonitor(), LibvirtAccess("qemu+ssh://host/system", "web")])
def test_a_vm_on_another_host_that_is_off_is_backed_up_there(access, offline, monkeypatch):
    @contextmanager
    def off_there(config, *_):
        yield f"the images of {config.name} there"

    @contextmanager
    def domain(*_):
        raise switched_off
        yield

    switched_off = MonitorUnreachable("the domain web is not running")
    switched_off.nobody_listens = True
    monkeypatch.setattr(libvirt_driver, "connect", domain)
    monkeypatch.setattr(off_driver, "connect", off_there)
    monkeypatch.setattr(off_driver, "connect_domain", off_there)
    there = tuple(replace(one, host=Address.parse("ssh://host/image")) for one in IMAGES)
    images = there if isinstance(access, NoMonitor) else ()
    found = VmConfig(VmName("web"), access, images=images)
    assert open_driver.is_remote(found)
    assert opened(found) == "the images of web there"
    assert offline == []
    if not images:
        with pytest.raises(VmIsOff):
            opened(replace(found, when_off="skip"))


def test_a_vm_without_monitor_is_its_images():
    assert opened(vm(None, images=IMAGES)) == "the images"
