# SPDX-License-Identifier: GPL-2.0-or-later
"""The drills on other VMs: domains of libvirt, VMs on another host, and VMs that are off, here or there.

`make test` plays a few, `make test-long` all that make sense there.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backupctl.drills import sites
from backupctl.drills.catalog import DRILLS, Drill
from backupctl.drills.fork_server import ForkServer
from backupctl.drills.site import Site
from backupctl.drills.sites import DISKS
from fixtures.debian import CannotBeHad
from fixtures.libvirtd import Domain
from fixtures.sshd import Sshd
from tests.drills.other_sites import (
    DomainSite,
    ImagesSite,
    OffDomainSite,
    RemoteDomainSite,
    RemoteImagesSite,
    RemoteOffDomainSite,
)
from tests.libvirt_lab import wait_for

BY_NAME = {drill.name: drill for drill in DRILLS}


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as made:
        yield made


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of a short name: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="bd-") as name:
        yield Path(name)


Request = pytest.FixtureRequest


@contextmanager
def by_ssh(
    request: Request, directory: Path, fork_server: ForkServer, local: Callable[..., Any] = sites.simulator
) -> Iterator[Site]:
    """A simulated VM on another host."""
    with host(request, directory) as sshd, local(directory, fork_server) as site:
        site.qmp = sshd.address(site.qmp.removeprefix("unix:"))
        site.agent = site.agent and sshd.address(site.agent.removeprefix("unix:"))
        yield site
        sshd.await_end()


@contextmanager
def host(request: Request, directory: Path) -> Iterator[Sshd]:
    """Another host, which backupctl reaches in the block."""
    patch = request.getfixturevalue("monkeypatch")
    try:
        sshd = Sshd(directory / "sshd")
    except CannotBeHad as err:
        pytest.skip(str(err))
    sshd.start()
    for name, value in sshd.environment.items():
        patch.setenv(name, value)
    try:
        yield sshd
    finally:
        sshd.close()


@contextmanager
def qemu_by_ssh(request: Request, directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """A QEMU on another host."""
    with by_ssh(request, directory, fork_server, sites.real) as site:
        yield site


@contextmanager
def domain(request: Request, directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """A domain of libvirt."""
    with made(DomainSite, directory, fork_server, domain=_domain(request, directory)) as site:
        yield site


@contextmanager
def domain_that_is_off(request: Request, directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """A domain of libvirt that is off."""
    found = _domain(request, directory)
    found.quit()
    wait_for(lambda: not found.handle().isActive())
    with made(OffDomainSite, directory, fork_server, domain=found) as site:
        yield site


@contextmanager
def images(_request: Request, directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """A VM that is off, by its images."""
    _create_images(directory)
    with made(ImagesSite, directory, fork_server) as site:
        yield site


@contextmanager
def domain_by_ssh(request: Request, directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """A domain of libvirt on another host."""
    with host(request, directory) as sshd:
        found = _domain(request, directory)
        with made(RemoteDomainSite, directory, fork_server, domain=found, sshd=sshd) as site:
            yield site
            sshd.await_end()


@contextmanager
def off_domain_by_ssh(request: Request, directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """A domain of libvirt on another host that is off."""
    with host(request, directory) as sshd:
        found = _domain(request, directory)
        found.quit()
        wait_for(lambda: not found.handle().isActive())
        with made(RemoteOffDomainSite, directory, fork_server, domain=found, sshd=sshd) as site:
            yield site
            sshd.await_end()


@contextmanager
def images_by_ssh(request: Request, directory: Path, fork_server: ForkServer) -> Iterator[Site]:
    """A VM on another host that is off, by its images."""
    _create_images(directory)
    with (
        host(request, directory) as sshd,
        made(RemoteImagesSite, directory, fork_server, sshd=sshd) as site,
    ):
        yield site
        sshd.await_end()


@contextmanager
def made(kind: Callable[..., Site], directory: Path, fork_server: ForkServer, **more: Any) -> Iterator[Site]:
    site: Any = kind(directory, fork_server, options=("--freeze", "never"), program="", **more)
    try:
        yield site
    finally:
        site.close()


def _create_images(directory: Path) -> dict[str, Path]:
    found = {name: directory / f"{name}.qcow2" for name in DISKS}
    for name, path in found.items():
        words = ["qemu-img", "create", "-q", "-f", "qcow2", path, str(DISKS[name])]
        subprocess.run(words, check=True, timeout=60)
    return found


def _domain(request: Request, directory: Path) -> Domain:
    disks = [{"target": name, "path": path} for name, path in _create_images(directory).items()]
    name = f"d{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**8}"
    found = Domain(request.getfixturevalue("daemon"), name, disks)
    found.start()
    return found


KILLS = [name for name in BY_NAME if name.startswith("kill-")]
HERE = ["sigterm", "sigint", "target-full", "two-runs", "damaged-manifest", "damaged-data"]
REAL = [drill.name for drill in DRILLS if not drill.simulator_only]
OF_QEMU = ["qemu-crashes", "qemu-restarts", "job-ended", "snapshot"]
WITHOUT_GUEST = [name for name in KILLS if not BY_NAME[name].simulator_only]
DRILLED: dict[Callable[..., Any], list[str]] = {
    by_ssh: list(BY_NAME),
    qemu_by_ssh: REAL,
    domain: [*WITHOUT_GUEST, *HERE, *OF_QEMU],
    domain_that_is_off: [*WITHOUT_GUEST, *HERE],
    images: [*WITHOUT_GUEST, *HERE],
    domain_by_ssh: [*WITHOUT_GUEST, *HERE, *OF_QEMU],
    off_domain_by_ssh: [*WITHOUT_GUEST, *HERE],
    images_by_ssh: [*WITHOUT_GUEST, *HERE],
}
QUICK = {
    by_ssh: ["agent-frozen", "reply-lost"],
    domain: ["two-runs"],
    domain_that_is_off: ["damaged-manifest"],
    images: ["target-full"],
    domain_by_ssh: ["job-ended"],
    images_by_ssh: ["sigterm"],
}


def named(way: Callable[..., Any]) -> str:
    return way.__name__.replace("_", "-")


def cases() -> list[Any]:
    """Return each drill of each way as a parameter."""
    return [
        pytest.param(
            way,
            BY_NAME[name],
            id=f"{named(way)}-{name}",
            marks=[] if name in QUICK.get(way, []) else [pytest.mark.slow],
        )
        for way, names in DRILLED.items()
        for name in names
    ]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("way", "drill"), cases())
def test_a_drill(
    request: Request,
    way: Callable[..., Any],
    drill: Drill,
    directory: Path,
    fork_server: ForkServer,
    record_property: Callable[[str, object], None],
) -> None:
    with way(request, directory, fork_server) as site:
        drill.play(site)
    assert site.compared_bytes
    record_property("cases", (f"drills: {named(way)}", 1))
