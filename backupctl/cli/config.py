# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file `backupctl.toml`, and how the command line overrides it.

::

    [defaults]                       what holds for every VM
    repository = "/backup"

    [vm.web]
    qmp = "unix:/run/qemu/web.qmp"
    agent = "unix:/run/qemu/web.agent"
    [vm.web.disks]                   QEMU's name of a disk = the name it is stored under
    virtio0 = "system"

Looked for in: ``--config``, ``$BACKUPCTL_CONFIG``, the user's and the system's configuration folder; never in
the current folder, and believed only if nobody else could have written it (`trusted.py`).

A key that is not known is an error: a misspelt `limit` must not be silently none. So is a path that depends
on where we were started, and what would lead two VMs, or two disks, into one folder.
"""

import os
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from backupctl.errors import InvalidName, UsageError
from backupctl.names import disk_name, vm_name
from backupctl.options import FreezeMode, OnBrokenChain, ViewKind, VmConfig
from backupctl.sizes import MAX_CHAIN
from backupctl.system import trusted
from backupctl.system.address import Address

FILE_NAME = "backupctl.toml"
SYSTEM_FILE = Path("/etc/backupctl") / FILE_NAME
MAX_BYTES = 256 * 1024
MAX_FREEZE_SECONDS = 3600
MAX_COUNT = 1000
_CHOICES: dict[str, tuple[str, ...]] = {
    "freeze": get_args(FreezeMode),
    "view": get_args(ViewKind),
    "on_broken_chain": get_args(OnBrokenChain),
}
_STRINGS = frozenset(
    {"repository", "scratch", "scratch_size", "freeze", "limit", "view", "on_broken_chain", "keep_within"}
)
_KEPT = frozenset(f"keep_{name}" for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly"))
_COUNTS = _KEPT | {"keep_checkpoints", "max_chain"}
_NUMBERS = _COUNTS | {"freeze_budget"}
_SETTINGS = _STRINGS | _NUMBERS
_OF_VM = _SETTINGS | {"qmp", "agent", "disks"}
_PATHS = frozenset({"repository", "scratch"})
_SOCKETS = ("qmp", "agent")


@dataclass(frozen=True)
class Config:
    """What the configuration file says; empty if there is none. path: where it was found."""

    path: Path | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    vms: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def file(self) -> str | None:
        """Where it was found, for people and programs."""
        return str(self.path) if self.path else None

    def setting(self, vm: str | None, name: str) -> Any:
        """Return a setting of a VM, or the default for all, or None."""
        return self.vms.get(vm or "", {}).get(name, self.defaults.get(name))

    def repository(self, vm: str | None, given: str | None) -> Path:
        """Return the repository's folder. Raises UsageError."""
        found = given or self.setting(vm, "repository")
        if not found:
            raise UsageError(
                "no repository is known",
                hint=f"use --repository DIR, or set repository in {self.path or SYSTEM_FILE}",
            )
        return absolute(found, "the repository")

    def repositories(self) -> tuple[Path, ...]:
        """Return the folder of each repository that the file names, in its order. Raises UsageError."""
        vms = [vm for vm in self.vms if self.setting(vm, "repository")]
        default = [None] if self.defaults.get("repository") else []
        return tuple(dict.fromkeys(self.repository(vm, None) for vm in (*default, *vms)))

    def vm(self, name: str, qmp: str | None, agent: str | None) -> VmConfig:
        """Return a VM as the file and the command line describe it. Raises UsageError."""
        try:
            checked = vm_name(name)
        except InvalidName as err:
            raise UsageError(err.message) from err
        monitor = qmp or self.setting(name, "qmp")
        if not monitor:
            there = ", ".join(sorted(self.vms)) or "none"
            raise UsageError(
                f"no monitor is known for {name!r:.120} (VMs in the configuration: {there})",
                hint=f"use --qmp unix:PATH, or configure [vm.{checked}] in {self.path or SYSTEM_FILE}",
            )
        guest = agent or self.setting(name, "agent")
        return VmConfig(
            checked,
            Address.parse(monitor),
            Address.parse(guest) if guest else None,
            dict(self.setting(name, "disks") or {}),
        )


def absolute(text: str, what: str) -> Path:
    """Return a path as an absolute one. Raises UsageError, naming what it is the path of.

    QEMU is told paths in JSON, so one that is not UTF-8 would fail in the middle of a run.
    """
    try:
        found = Path(text).expanduser().absolute()
        str(found).encode()
    except RuntimeError as err:
        raise UsageError(f"{what}: no home folder is known for {text!r:.200}") from err
    except UnicodeEncodeError as err:
        raise UsageError(f"{what}: {text!r:.200} is not UTF-8") from err
    except OSError as err:
        raise UsageError(
            f"{what}: {text!r:.200} is relative, and the current directory cannot be found: {err.strerror}",
            next_command="cd /",
        ) from err
    if "\0" in text:
        raise UsageError(f"{what}: {text!r:.200} can't be a path")
    return found


def load(given: str | None) -> Config:
    """Find and read the configuration file. Raises UsageError."""
    named = given or os.environ.get("BACKUPCTL_CONFIG")
    places = (absolute(named, "the configuration"),) if named else filter(_is_there, _places())
    place = next(iter(places), None)
    return _read(place) if place else Config()


def _is_there(place: Path) -> bool:
    """Whether there is anything, to be believed or not. Raises UsageError if that can't be told."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as err:
        raise _unreadable(place, err) from err
    return True


def _places() -> Iterator[Path]:
    """Name the files to look for; a folder that depends on where we were started is none."""
    user = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    with suppress(RuntimeError):  # there is no home
        user = user.expanduser()
    if user.is_absolute():
        yield user / "backupctl" / FILE_NAME
    yield SYSTEM_FILE


def _read(path: Path) -> Config:
    """Read a file. Raises UsageError."""
    try:
        text = trusted.read(path, MAX_BYTES)
        if len(text) > MAX_BYTES:
            raise UsageError(f"the configuration {path} is larger than {MAX_BYTES >> 10} KiB")
        content = tomllib.loads(text.decode())
    except (OSError, ValueError, RecursionError) as err:  # all that is no TOML is a ValueError, or too deep
        raise _unreadable(path, err) from err
    return _checked(path, content)


def _unreadable(path: Path, err: Exception) -> UsageError:
    why = (isinstance(err, OSError) and err.strerror) or str(err)
    return UsageError(f"the configuration {path} can't be read: {why:.500}")


def _checked(path: Path, content: dict[str, Any]) -> Config:
    _only(content, {"defaults", "vm"}, path, "at the top")
    defaults = _table(content.get("defaults", {}), path, "[defaults]")
    _check(defaults, _SETTINGS, path, "[defaults]")
    vms = _table(content.get("vm", {}), path, "[vm]")
    for name, settings in vms.items():
        _check(_table(settings, path, f"[vm.{name}]"), _OF_VM, path, f"[vm.{name}]")
        _check_names(name, settings, path)
        _check_sockets(name, settings, path)
    found = Config(path, defaults, vms)
    _refuse_shared(found, path)
    return found


def _check(settings: dict[str, Any], known: frozenset[str], path: Path, where: str) -> None:
    _only(settings, known, path, where)
    for name, value in settings.items():
        if name == "disks":
            continue
        if name == "freeze_budget" and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= MAX_FREEZE_SECONDS  # which is no number, or without end, is not in between
        ):
            raise UsageError(
                f"{path}: {name} in {where} must be a number of seconds, {MAX_FREEZE_SECONDS} at the most"
            )
        most = MAX_CHAIN if name == "max_chain" else MAX_COUNT
        if name in _COUNTS and (
            isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most
        ):
            raise UsageError(f"{path}: {name} in {where} must be a whole number, 0 to {most}")
        if name not in _NUMBERS and not isinstance(value, str):
            raise UsageError(f"{path}: {name} in {where} must be a text in quotes")
        if name in _PATHS and not Path(value).is_absolute() and not value.startswith("~"):
            raise UsageError(
                f"{path}: {name} in {where} must be an absolute path, not {value!r:.120}: "
                "it must not depend on where backupctl is started"
            )
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UsageError(f"{path}: {name} in {where} must be one of: {', '.join(_CHOICES[name])}")


def _check_names(name: str, settings: dict[str, Any], path: Path) -> None:
    try:
        vm_name(name)
        disks = _table(settings.get("disks", {}), path, f"[vm.{name}.disks]")
        for stored in disks.values():
            disk_name(stored if isinstance(stored, str) else "")
    except InvalidName as err:
        raise UsageError(f"{path}: [vm.{name}]: {err.message}") from err
    for stored in disks.values():
        if len(both := [disk for disk, one in disks.items() if one == stored]) > 1:
            raise UsageError(
                f"{path}: {' and '.join(both)} in [vm.{name}.disks] can't both be stored as {stored!r}"
            )


def _check_sockets(name: str, settings: dict[str, Any], path: Path) -> None:
    """Raise UsageError for an address that is none, or that depends on where we were started."""
    for key in _SOCKETS:
        if key not in settings:
            continue
        try:
            address = Address.parse(settings[key])
        except UsageError as err:
            raise UsageError(f"{path}: {key} in [vm.{name}]: {err.message}") from err
        if address.path and not Path(address.path).is_absolute():
            raise UsageError(
                f"{path}: {key} in [vm.{name}] must be an absolute path, not {address.path!r:.120}"
            )


def _refuse_shared(found: Config, path: Path) -> None:
    """Raise UsageError if two VMs of one repository have the same monitor, or the same agent.

    One VM in two repositories is two VMs of the file, with one monitor.
    """
    seen: dict[tuple[str, str, str], str] = {}
    for name, settings in found.vms.items():
        repository = str(found.setting(name, "repository") or "")
        for key in _SOCKETS:
            if key not in settings:
                continue
            address = str(Address.parse(settings[key]))
            other = seen.setdefault((key, os.path.normpath(address), os.path.normpath(repository)), name)
            if other != name:
                raise UsageError(f"{path}: [vm.{other}] and [vm.{name}] have the same {key}, {address:.200}")


def _only(settings: dict[str, Any], known: set[str] | frozenset[str], path: Path, where: str) -> None:
    for name in settings:
        if name not in known:
            raise UsageError(
                f"{path}: {name!r:.60} {where} is not known; known are: {', '.join(sorted(known))}"
            )


def _table(value: object, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: {where} must be a table")
    return value
