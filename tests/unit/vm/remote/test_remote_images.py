# SPDX-License-Identifier: GPL-2.0-or-later
"""Images on another host: what our program there does with them, and lies of it. No sshd or QEMU is run."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from backupctl.errors import Failed, MonitorError, MonitorUnreachable, Refused
from backupctl.names import DiskName, VmName
from backupctl.options import ImageFile, NoMonitor, Timeouts, VmConfig, VmImage
from backupctl.system import ssh
from backupctl.system.address import Address
from backupctl.vm.remote.connected_host import connected
from backupctl.vm.remote.images import ImagesHost, RemoteImages

HOST = Address.parse("ssh://host/image")
TIMEOUTS = Timeouts(command_seconds=0.2)
HERE = 'for last; do :; done; exec /bin/sh -c "$last"'
"""An ssh that runs the command on this machine."""
DAEMON = """#!/bin/sh
trap 'echo stored >{stored}; exit 0' TERM
for last; do :; done
echo $$ >"$last"
while :; do sleep 0.05; done
"""
"""A storage daemon that says when it is ended in good order, and opens nothing."""


@pytest.fixture(autouse=True)
def stored(tmp_path, monkeypatch) -> Path:
    """Have an ssh and a daemon of ours; return the file that a daemon writes when it ends in good order."""
    programs = tmp_path / "programs"
    programs.mkdir()
    stored = tmp_path / "stored"
    for name, text in (("ssh", f"#!/bin/sh\n{HERE}\n"), ("daemon", DAEMON.format(stored=stored))):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("QEMU_STORAGE_DAEMON", str(programs / "daemon"))
    monkeypatch.setattr(ssh, "_END_SECONDS", 20.0)
    return stored


def vm(path: Path, kind: str = "raw") -> VmConfig:
    image = VmImage(DiskName("vda"), (ImageFile(path, kind),), HOST)
    return VmConfig(VmName("web"), NoMonitor(), images=(image,))


@contextmanager
def there(config: VmConfig):
    with connected(ImagesHost(config, TIMEOUTS), TIMEOUTS) as host:
        yield RemoteImages(host, config.images)


@pytest.fixture
def raw(tmp_path) -> Path:
    made = tmp_path / "disk.raw"
    made.write_bytes(bytes(4096))
    return made


def test_a_line_that_is_cut_ends_the_daemon_in_good_order(raw, stored):
    with there(vm(raw)) as images:
        images.start()
        (disk,) = images.disks
        assert disk.path == raw
        assert images.states() == [(4096, raw.stat().st_mtime_ns)]
        assert not stored.exists()
    assert stored.read_text() == "stored\n"


def test_a_daemon_that_is_to_end_at_once_is_killed(raw, stored):
    with there(vm(raw)) as images:
        images.start()
        images.kill()
    assert not stored.exists()


def test_another_run_waits_until_the_daemon_has_ended(raw):
    with there(vm(raw)) as images:
        images.start()
        with pytest.raises(MonitorUnreachable, match="still works on this VM"), there(vm(raw)):
            pass
    with there(vm(raw)) as images:
        images.start()


def test_what_is_wrong_with_an_image_there_is_told_with_its_host_and_what_to_do(tmp_path, raw):
    with there(vm(raw, "qcow2")) as images, pytest.raises(Refused) as refused:
        images.start()
    assert refused.value.message == f"on host: {raw} is not a valid qcow2 image: no qcow2 magic number"
    assert "format=raw" in refused.value.hint
    link = tmp_path / "missing"
    with there(vm(link)) as images, pytest.raises(MonitorUnreachable, match="on host: cannot open"):
        images.start()


def test_a_host_without_a_storage_daemon_names_the_package(raw, monkeypatch):
    monkeypatch.setenv("QEMU_STORAGE_DAEMON", "/nowhere/daemon")
    with there(vm(raw)) as images, pytest.raises(Failed, match="on host: cannot start") as failed:
        images.start()
    assert "qemu-system-common" in failed.value.hint


FILE = {"path": "/a", "descriptor": 7, "device": False}


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        [[]],
        [[FILE, FILE]],
        [[{**FILE, "path": "/a\x1b[2J"}]],
        [[{**FILE, "descriptor": -1}]],
        [[{**FILE, "device": "no"}]],
        [[{"path": "/a"}]],
        [[5]],
    ],
)
def test_a_host_that_tells_of_other_files_than_were_asked_for_is_not_believed(raw, told, monkeypatch):
    host = ImagesHost(vm(raw), TIMEOUTS)
    monkeypatch.setattr(ImagesHost, "alive", True)
    monkeypatch.setattr(host, "open_again", lambda: None)
    monkeypatch.setattr(host, "ask_images", lambda *_, **__: told)
    with pytest.raises(MonitorError):
        RemoteImages(host, vm(raw).images).start()


def test_a_host_that_never_answers_about_its_daemon_is_left_in_time(raw):
    begun = time.monotonic()
    with there(vm(raw)) as images:
        images.start()
        images._there._channel._broken = "cut"
        images.end()
        images.kill()
        assert "cut" in images.reason()
        assert images.ended
    assert time.monotonic() - begun < 20
