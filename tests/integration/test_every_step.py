# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGKILL, a line that is cut, or the end of libvirtd, at every step of a run, for each way to a VM.

`make test` plays some of the steps that change something, `make test-long` all. A failing case names its
step. A VM that is reached by its monitor on this host has test_killed.py and tests/exploration.
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fixtures import builds
from fixtures.libvirtd import Libvirtd
from fixtures.sshd import HOST
from tests import libvirt_lab
from tests.conftest import MIB, get_build
from tests.every_step import WHEN, Subject, image_writer, sample, storage_daemons
from tests.libvirt_lab import wait_for

SIZES = {"vda": 4 * MIB, "vdb": 2 * MIB}
CHUNKS = 4


def machine(request: pytest.FixtureRequest, build: builds.Build) -> Any:
    lab = request.getfixturevalue("make_lab")(build, {**SIZES, "vdb": SIZES["vdb"] + 512})
    lab.writer.write(10)
    return lab


def ssh(request: pytest.FixtureRequest, build: builds.Build | None = None) -> Subject:
    """A VM on another host, by its monitor."""
    lab = machine(request, build or get_build("installed"))
    sshd = request.getfixturevalue("sshd")
    lab.cli.environment.update(sshd.environment)
    qmp, agent = map(sshd.address, (lab.machine.qmp_path, lab.machine.agent_path))
    lab.cli.vm = ["--qmp", qmp, "--agent", agent]
    lab.backup("full", "--freeze", "require")

    def settle(_action: str) -> None:
        sshd.await_end()
        assert not lab.agent.frozen

    cut = {"SSHD_PID": str(sshd.pid)}
    return Subject(lab.cli, lab.writer, lab.directory, lab.assert_at_rest, lambda: cut, settle)


def simulated_ssh(request: pytest.FixtureRequest) -> Subject:
    """The same of the simulator."""
    return ssh(request, builds.simulator(builds.VERSIONS[0]))


def images(request: pytest.FixtureRequest) -> Subject:
    """A VM that is off, by its images, and is started at the end."""
    lab = machine(request, get_build("oldest"))
    paths = {disk.name: disk.path for disk in lab.machine.disks}
    lab.cli.vm += [word for disk, path in paths.items() for word in ("--image", f"{disk}={path}")]
    lab.backup("full")
    lab.machine.quit()

    def settle(_action: str) -> None:
        await_images(paths)

    def finish() -> None:
        lab.machine.start()
        lab.next_is_right()

    return Subject(
        lab.cli,
        image_writer(paths, lab.writer, lab.machine.build.tool("qemu-io")),
        lab.directory,
        lambda: assert_only_points(lab),
        settle=settle,
        finish=finish,
        reopens=REOPENS,
    )


def images_ssh(request: pytest.FixtureRequest) -> Subject:
    """A VM on another host that is off, by its images. The daemon there always ends in good order."""
    subject = images(request)
    sshd = request.getfixturevalue("sshd")
    subject.cli.environment.update(sshd.environment)
    where = sshd.address("")
    qmp = subject.cli.vm[1].removeprefix("unix:")
    words = [word.replace("=", f"={where}", 1) for word in subject.cli.vm if word.startswith("vd")]
    by_monitor = subject.cli.vm[:]
    subject.cli.vm = ["--qmp", f"{where}{qmp}", *(word for one in words for word in ("--image", one))]
    local = subject.settle, subject.finish

    def settle(action: str) -> None:
        sshd.await_end()
        local[0](action)

    def finish() -> None:
        subject.cli.vm = by_monitor
        local[1]()

    return replace(
        subject, environment=lambda: {"SSHD_PID": str(sshd.pid)}, settle=settle, finish=finish, reopens=""
    )


def domain(request: pytest.FixtureRequest) -> libvirt_lab.Lab:
    found = (request.getfixturevalue(name) for name in ("daemon", "tmp_path", "held"))
    lab = libvirt_lab.maker(*found, request.node.nodeid)(SIZES)
    lab.writer.write(10)
    return lab


def libvirt(request: pytest.FixtureRequest) -> Subject:
    """A domain of libvirt."""
    lab = domain(request)
    lab.backup("full")
    ending = EndOfLibvirtd(lab.domain.daemon)
    return of_domain(lab, ending.environment, ending.settle)


def libvirt_ssh(request: pytest.FixtureRequest) -> Subject:
    """A domain of libvirt on another host."""
    lab = domain(request)
    sshd = request.getfixturevalue("sshd")
    lab.cli.environment.update(sshd.environment)
    where = f"qemu+ssh://{HOST}/system?socket={lab.domain.daemon.directory}/sock/libvirt-sock"
    lab.cli.vm = ["--libvirt", where, "--domain", lab.domain.name]
    lab.backup("full")
    return of_domain(lab, lambda: {"SSHD_PID": str(sshd.pid)}, lambda _action: sshd.await_end())


def of_domain(
    lab: libvirt_lab.Lab, environment: Callable[[], dict[str, str]], await_end: Callable[[str], None]
) -> Subject:
    def settle(action: str) -> None:
        await_end(action)
        wait_for(lambda: not lab.domain.has_job())
        assert lab.domain.is_running()

    return Subject(lab.cli, lab.writer, lab.directory, lab.assert_clean, environment, settle)


class EndOfLibvirtd:
    """The libvirtd that an interruption may end, and its successor."""

    def __init__(self, daemon: Libvirtd) -> None:
        self._daemon = daemon
        self._process = 0

    def environment(self) -> dict[str, str]:
        self._process = self._daemon.daemon_process()
        return {"VM_PID": str(self._process)}

    def settle(self, action: str) -> None:
        """Wait until it has ended, if it was to, and the next one serves."""
        if action:
            wait_for(lambda: not Path(f"/proc/{self._process}").exists())
        self._daemon.come_again()


def libvirt_off(request: pytest.FixtureRequest) -> Subject:
    """A domain of libvirt that is off, and is started at the end."""
    lab = domain(request)
    lab.backup("full")
    lab.domain.quit()
    wait_for(lambda: not lab.domain.handle().isActive())
    paths = {str(disk["target"]): Path(disk["path"]) for disk in lab.domain.disks}
    ending = EndOfLibvirtd(lab.domain.daemon)

    def settle(action: str) -> None:
        ending.settle(action)
        await_images(paths)

    def clean() -> None:
        assert len([one for one in lab.domain.checkpoints() if one.startswith("backupctl-")]) == 1
        assert_only_points(lab)

    def finish() -> None:
        lab.domain.start()
        lab.next_is_right()

    return Subject(
        lab.cli,
        image_writer(paths, lab.writer),
        lab.directory,
        clean,
        ending.environment,
        settle,
        finish,
        REOPENS,
    )


def libvirt_off_ssh(request: pytest.FixtureRequest) -> Subject:
    """A domain of libvirt on another host that is off."""
    subject = libvirt_off(request)
    sshd = request.getfixturevalue("sshd")
    subject.cli.environment.update(sshd.environment)
    local, socket = subject.settle, subject.cli.vm[1].partition("socket=")[2]
    subject.cli.vm[1] = f"qemu+ssh://{HOST}/system?socket={socket}"

    def settle(_action: str) -> None:
        sshd.await_end()
        local("")

    return replace(subject, environment=lambda: {"SSHD_PID": str(sshd.pid)}, settle=settle, reopens="")


REOPENS = "execute blockdev-reopen"


def await_images(paths: dict[str, Path]) -> None:
    """Wait until no daemon has them; they are whole then, with clusters perhaps that nothing uses."""
    wait_for(lambda: not storage_daemons(paths.values()))
    for path in paths.values():
        done = subprocess.run(["qemu-img", "check", "-q", path], timeout=60, check=False)
        assert done.returncode in (0, 3)


def assert_only_points(lab: Any) -> None:
    assert not list((lab.cli.repository / "web").glob("*.partial"))
    assert not list(lab.cli.scratch.iterdir())


AXES: dict[str, Callable[[pytest.FixtureRequest], Subject]] = {
    "libvirt": libvirt,
    "libvirt-off": libvirt_off,
    "libvirt-off-ssh": libvirt_off_ssh,
    "libvirt-ssh": libvirt_ssh,
    "images": images,
    "images-ssh": images_ssh,
    "ssh": ssh,
    "ssh-simulator": simulated_ssh,
}
"""Ways to a VM."""
ACTIONS = {
    "SIGKILL": "",
    "cut": "cut",
    "unplugged": "unplugged",
    "libvirtd-killed": "crash",
    "libvirtd-restarted": "terminate",
}
"""What happens at a step, and how `tests.interrupted_cli` calls it."""
EVERY = [
    *((axis, "SIGKILL") for axis in AXES),
    *((axis, "cut") for axis in ("libvirt-off-ssh", "libvirt-ssh", "images-ssh", "ssh", "ssh-simulator")),
    ("ssh-simulator", "unplugged"),
    *(
        (axis, what)
        for axis in ("libvirt", "libvirt-off")
        for what in ("libvirtd-killed", "libvirtd-restarted")
    ),
]
BEFORE, AFTER = WHEN[:1], WHEN[1:]
SOME: dict[tuple[str, str], dict[str, Sequence[str]]] = {
    ("libvirt", "SIGKILL"): {
        "call virDomainBackupBegin": WHEN,
        "hold": AFTER,
        "ready": BEFORE,
        "call virDomainAbortJob": WHEN,
        "rename": WHEN,
        "call virDomainCheckpointDelete": WHEN,
    },
    ("libvirt", "libvirtd-killed"): {
        "call virDomainBackupBegin": WHEN,
        "call virDomainAbortJob": WHEN,
        "call virDomainCheckpointDelete": WHEN,
    },
    ("libvirt-off", "SIGKILL"): {"call virDomainCheckpointCreateXML": WHEN, "rename": BEFORE},
    ("libvirt-off", "libvirtd-killed"): {
        "execute block-export-add": BEFORE,
        "call virDomainCheckpointCreateXML": AFTER,
    },
    ("libvirt-ssh", "SIGKILL"): {
        "call virDomainBackupBegin": BEFORE,
        "hold": AFTER,
        "call virDomainCheckpointDelete": BEFORE,
    },
    ("libvirt-ssh", "cut"): {
        "call virDomainBackupBegin": AFTER,
        "hold": AFTER,
        "ready": BEFORE,
        "call virDomainAbortJob": BEFORE,
    },
    ("images", "SIGKILL"): {
        "execute transaction": WHEN,
        "execute block-export-add": AFTER,
        "execute block-dirty-bitmap-remove": WHEN,
        "execute blockdev-reopen": WHEN,
        "rename": WHEN,
    },
    ("libvirt-off-ssh", "cut"): {
        "execute block-export-add": AFTER,
        "call virDomainCheckpointCreateXML": WHEN,
        "execute blockdev-reopen": AFTER,
    },
    ("images-ssh", "SIGKILL"): {
        "execute block-export-add": AFTER,
        "execute blockdev-reopen": WHEN,
        "rename": BEFORE,
    },
    ("images-ssh", "cut"): {
        "execute block-export-add": WHEN,
        "execute blockdev-reopen": WHEN,
        "rename": WHEN,
    },
    ("ssh", "cut"): {
        "execute blockdev-add": AFTER,
        "freeze": AFTER,
        "execute transaction": WHEN,
        "hold": AFTER,
        "rename": WHEN,
    },
    ("ssh-simulator", "SIGKILL"): {"execute transaction": WHEN, "execute block-export-add": AFTER},
    ("ssh-simulator", "unplugged"): {"execute transaction": WHEN, "hold": AFTER},
    ("ssh-simulator", "cut"): {
        "execute nbd-server-start": AFTER,
        "execute block-export-add": WHEN,
        "release": BEFORE,
        "execute block-job-cancel": WHEN,
    },
}
"""The cases of `make test`: steps of a run by name, and whether before or after them."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("played", SOME, ids="-".join)
def test_some_steps(
    request: pytest.FixtureRequest, played: tuple[str, str], record_property: Callable[[str, object], None]
) -> None:
    axis, what = played
    subject = AXES[axis](request)
    wanted = sample(subject.steps(), SOME[played])
    assert subject.explore(wanted, ACTIONS[what]) == len(wanted)
    assert set(subject.codes) - {0}, "no run noticed it"
    record_property("cases", (f"{axis}: {what} at some steps", len(wanted)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("played", EVERY, ids="-".join)
def test_every_step(
    request: pytest.FixtureRequest,
    played: tuple[str, str],
    when: str,
    chunk: int,
    record_property: Callable[[str, object], None],
) -> None:
    axis, what = played
    subject = AXES[axis](request)
    numbers = range(chunk, len(subject.steps()), CHUNKS)
    cases = subject.explore([(number, when) for number in numbers], ACTIONS[what])
    record_property("cases", (f"{axis}: {what} {when} a step", cases))
    record_property("cases", (f"{axis}: {what} {when} a step: a bitmap was lost", len(subject.scans)))
    assert set(subject.codes) - {0}, "no run noticed it"
    assert cases > 10
