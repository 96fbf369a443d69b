# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VM and which repository a command line and the configuration mean, and how they are opened."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from backupctl.cli import configuration, image_texts, param_types
from backupctl.cli.configuration import Config
from backupctl.cli.selection import Selection, is_pattern
from backupctl.errors import UNTOUCHED, BackupctlError, NotARepository, RepositoryError, UsageError
from backupctl.names import VmName, did_you_mean, vm_name
from backupctl.options import (
    DEFAULT_TIMEOUTS,
    Access,
    LibvirtAccess,
    NoMonitor,
    QmpAccess,
    ScratchOptions,
    Timeouts,
    VmConfig,
    VmImage,
)
from backupctl.system import libvirt_uri
from backupctl.system.address import Address

if TYPE_CHECKING:  # every call loads this module, `--version` too, and few open a repository
    from backupctl.repository.repository import Repository
    from backupctl.repository.vm_directory import VmDirectory


@dataclass(frozen=True)
class Target:
    """Which VM and which repository a command line means.

    name: the only VM; None for any other number of them, see `selection`. image: those that were typed.
    if_running: whether a VM that is off is to be skipped, whatever is configured. plain_tcp: whether monitor
    and agent may be reached over a network without encryption.
    repository_path: as typed, or configured for the VM that is named. typed_repository: whether it was typed.
    """

    config: Config
    name: VmName | None
    repository_path: Path | None
    typed_repository: bool
    selection: Selection = field(default_factory=Selection)
    qmp: Address | None = None
    agent: Address | None = None
    image: tuple[VmImage, ...] = ()
    if_running: bool = False
    plain_tcp: bool = False
    libvirt: str | None = None
    domain: str | None = None
    scratch: Path = ScratchOptions().directory
    timeouts: Timeouts = DEFAULT_TIMEOUTS

    @property
    def vm_name(self) -> VmName:
        """Return the NAME, of a command that cannot be called without one."""
        assert self.name is not None
        return self.name

    def vm(self) -> VmConfig:
        """Return the VM. Raises UsageError."""
        said = self.config.of(self.name)
        images = self.image or image_texts.parse_all(said.image)
        access, when_off = self._access(images), said.when_off
        if isinstance(access, NoMonitor):
            if self.if_running:
                raise UsageError(
                    f"VM {self.vm_name!r} has no monitor that could tell whether it runs (--if-running)",
                    hint=f"use --qmp unix:PATH, or set qmp in [vm.{self.vm_name}]",
                )
            when_off = None
        return VmConfig(
            self.vm_name, access, dict(said.disks), images, "skip" if self.if_running else when_off
        )

    def _access(self, images: tuple[VmImage, ...]) -> Access:
        if self.libvirt is not None:
            if self.agent is not None:
                raise UsageError(
                    "--agent cannot be used with --libvirt, which knows it by itself", state=UNTOUCHED
                )
            remote = libvirt_uri.is_remote(self.libvirt)
            _refuse_images_elsewhere(images, libvirt_uri.remote(self.libvirt).address if remote else None)
            return LibvirtAccess(self.libvirt, self.domain or self.vm_name)
        if self.qmp is None and not images:
            raise self._unconfigured()
        if self.qmp is None:
            _refuse_images_elsewhere(images, images[0].host)
            return NoMonitor()
        self._refuse_plain_tcp()
        self._refuse_agent_elsewhere()
        _refuse_images_elsewhere(images, self.qmp if self.qmp.remote else None)
        return QmpAccess(self.qmp, self.agent)

    def _refuse_plain_tcp(self) -> None:
        """Refuse a monitor or agent of which anybody on the network could read, or take over, everything."""
        for name, address in (("qmp", self.qmp), ("agent", self.agent)):
            if address is not None and not address.loopback and not self.plain_tcp:
                raise UsageError(
                    f"{name} is {address}, and what is said there is not encrypted: anybody on the way could "
                    "control the VM",
                    state=UNTOUCHED,
                    hint=f"use ssh://{address.host}/PATH with a unix socket on that host; on a network that "
                    "nobody else can reach, say so with --plain-tcp or plain_tcp = true",
                )

    def _refuse_agent_elsewhere(self) -> None:
        """Refuse an agent that is not on the host of the monitor, since the guard speaks to both."""
        qmp, agent = self.qmp, self.agent
        if qmp is None or agent is None or qmp[1:] == agent[1:] or not (qmp.remote or agent.remote):
            return
        wanted = qmp._replace(path="/PATH") if qmp.remote else "unix:PATH"
        raise UsageError(
            f"the agent {agent} is not on the host of the monitor {qmp}",
            state=UNTOUCHED,
            hint=f"the guard speaks to both, so the agent must be {wanted}",
        )

    def _unconfigured(self) -> UsageError:
        place = self.config.path or configuration.SYSTEM_FILE
        if self.vm_name in self.config.vms:
            table = f"[vm.{self.vm_name}] of {place}"
            why = f"VM {self.vm_name!r} has no monitor: neither qmp nor libvirt is set in {table}"
        elif self.config.path is None:
            why = f"VM {self.vm_name!r} is not configured: no configuration file found"
        else:
            listed = ", ".join(sorted(self.config.vms)) or "none"
            meant = did_you_mean(self.vm_name, self.config.vms)
            why = f"VM {self.vm_name!r} is not configured (VMs in {place}: {listed}){meant and f'; {meant}'}"
        return UsageError(
            why,
            hint=f"use --qmp unix:PATH or --libvirt qemu:///system, or set qmp or libvirt in "
            f"[vm.{self.vm_name}] of {place}",
        )

    def of(self, vm: str) -> "Target":
        """Return the same for one VM of the configuration."""
        configured = self.config.of(vm).repository
        path = (
            self.repository_path
            if self.typed_repository or not configured
            else param_types.absolute(configured)
        )
        return replace(self, name=vm_name(vm), repository_path=path)

    def by_repository(self) -> dict[Path, tuple[VmName | None, ...]]:
        """Return the repositories that are meant, and the VMs of each; (None,) for all that are in it.

        A pattern is one of VMs that are there. Raises UsageError, RepositoryError.
        """
        if self.name or self.selection.is_empty or self.selection.everything:
            return dict.fromkeys(self.directories(), (self.name,))
        there: dict[VmName, Path] = {}
        if any(map(is_pattern, self.selection.words)):
            there = {vm: path for path in self.directories() for vm in self.open(path).vms()}
        found: dict[Path, tuple[VmName | None, ...]] = {}
        for vm in self.selection.of(tuple(there)):
            path = self.of(vm).directory() if vm in self.config.vms or vm not in there else there[vm]
            found[path] = (*found.get(path, ()), vm)
        return found

    def vms_of(self, path: Path, opened: "Repository | None", names: Iterable[VmName | None]) -> list[VmName]:
        """Return the VMs that are meant of a repository. opened: None if it cannot be opened.

        None among names stands for those that are in it, and those that are configured for it.
        """
        given = set(names)
        named = {vm for vm in given if vm}
        if None in given:
            named |= set(opened.vms()) if opened else set()
            if not self.typed_repository:
                configured = (self.of(vm) for vm in self.config.vms)
                named |= {one.vm_name for one in configured if one.repository_path == path}
        return sorted(named)

    def has_repository(self) -> bool:
        """Whether there is one. Raises UsageError, RepositoryError."""
        try:
            _repositories().open(self.directory())
        except NotARepository:
            return False
        except RepositoryError as err:
            raise err.add(state=UNTOUCHED) from err
        return True

    def repository(self) -> "Repository":
        """Open the repository. Raises UsageError, RepositoryError."""
        return self.open(self.directory())

    def vm_directory(self) -> "VmDirectory":
        """Open the repository; return the VM's part of it. Raises UsageError, RepositoryError."""
        return self.repository().vm(self.vm_name)

    def directory(self) -> Path:
        """Return the repository's directory, which need not exist. Raises UsageError."""
        if self.repository_path is None:
            raise UsageError(
                "no repository is configured for this command",
                hint=f"use --repository DIR, or set repository in "
                f"{self.config.path or configuration.SYSTEM_FILE}",
            )
        return self.repository_path

    def directories(self) -> tuple[Path, ...]:
        """Return the directories that are meant: the one typed, the VM's, or all of the configuration.

        Raises UsageError.
        """
        everything = () if self.name or self.typed_repository else self.config.repositories()
        return everything or (self.directory(),)

    def open(self, path: Path) -> "Repository":
        """Open a repository. Raises UsageError, RepositoryError."""
        try:
            return _repositories().open(path)
        except NotARepository as err:
            raise UsageError(
                err.message,
                state=UNTOUCHED,
                hint="if you expected one, is its file system mounted? Otherwise take a first full",
                next_command=f"backupctl full {owner}" if (owner := self._owner(path)) else "",
            ) from err
        except RepositoryError as err:
            raise err.add(state=UNTOUCHED) from err

    def _owner(self, path: Path) -> str:
        """Name a VM that is backed up to a repository, for a first full; "" if none is known."""
        vms = (vm for vm in self.config.vms if self.of(vm).repository_path == path)
        return self.name or next(vms, "")

    def new_repository(self) -> "Repository":
        """Make the repository, or open the one that another run has just made. Raises RepositoryError."""
        try:
            return _repositories().open_or_create(self.directory())
        except NotARepository as err:
            raise UsageError(err.message) from err
        except RepositoryError as err:
            raise err.add(state=UNTOUCHED) from err

    def other_repositories(self) -> "list[Repository]":
        """Return the repositories that the configuration names besides this one, as far as they open."""
        opened: dict[str, Repository] = {}
        for path in sorted(set(self.config.repositories()) - {self.directory()}):
            with suppress(BackupctlError, OSError):
                found = _repositories().open(path)
                opened[found.id] = found
        with suppress(BackupctlError, OSError):
            opened.pop(_repositories().open(self.directory()).id, None)
        return list(opened.values())


def _refuse_images_elsewhere(images: tuple[VmImage, ...], host: Address | None) -> None:
    """Refuse an image that is not where the VM is, or another of its images. host: that; None for here."""
    for one in images:
        if (one.host and one.host[1:]) == (host and host[1:]):
            continue
        wanted = str(host._replace(path="/PATH")) if host else "a path of this host"
        raise UsageError(
            f"the image of {one.disk} ({one.files[0].path}) is on {_place(one.host)}, and the VM is on "
            f"{_place(host)}",
            state=UNTOUCHED,
            hint=f"all images are on the host of the VM: use {wanted}",
        )


def _place(host: Address | None) -> str:
    return str(host.host) if host else "this host"


def _repositories() -> "type[Repository]":
    from backupctl.repository.repository import Repository  # noqa: PLC0415 - as above

    return Repository
