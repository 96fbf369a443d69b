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

Looked for in: ``--config``, ``$BACKUPCTL_CONFIG``, ``./backupctl.toml``, the user's and the system's
configuration folder. A key that is not known is an error: a misspelt `limit` must not be silently none.
"""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from backupctl.errors import InvalidName, UsageError
from backupctl.names import disk_name, vm_name
from backupctl.settings import MAX_CHAIN, Address, FreezeWish, OnBrokenChain, ViewWish, Vm

FILE_NAME = "backupctl.toml"
MAX_BYTES = 256 * 1024
MAX_FREEZE_SECONDS = 3600
MAX_COUNT = 1000
_CHOICES: dict[str, tuple[str, ...]] = {
    "freeze": get_args(FreezeWish),
    "view": get_args(ViewWish),
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


@dataclass(frozen=True)
class Config:
    """What the configuration file says; empty if there is none. path: where it was found."""

    path: Path | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    vms: dict[str, dict[str, Any]] = field(default_factory=dict)

    def setting(self, vm: str | None, name: str) -> Any:
        """Return a setting of a VM, or the default for all, or None."""
        return self.vms.get(vm or "", {}).get(name, self.defaults.get(name))

    def repository(self, vm: str | None, given: str | None) -> Path:
        """Return the repository's folder. Raises UsageError."""
        found = given or self.setting(vm, "repository")
        if not found:
            raise UsageError(
                "no repository is known",
                next_command="give --repository DIR, or put repository = into the configuration file",
            )
        return Path(found).expanduser()

    def vm(self, name: str, qmp: str | None, agent: str | None) -> Vm:
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
                next_command=f"give --qmp unix:PATH, or put [vm.{checked}] into {self.path or FILE_NAME}",
            )
        guest = agent or self.setting(name, "agent")
        return Vm(
            checked,
            Address.parse(monitor),
            Address.parse(guest) if guest else None,
            dict(self.setting(name, "disks") or {}),
        )


def load(given: str | None) -> Config:
    """Find and read the configuration file. Raises UsageError."""
    named = given or os.environ.get("BACKUPCTL_CONFIG")
    if named:
        return _read(Path(named))
    for path in _places():
        if path.is_file():
            return _read(path)
    return Config()


def _places() -> list[Path]:
    user = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [Path(FILE_NAME), user / "backupctl" / FILE_NAME, Path("/etc/backupctl") / FILE_NAME]


def _read(path: Path) -> Config:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UsageError(f"the configuration {path} is larger than {MAX_BYTES >> 10} KiB")
        content = tomllib.loads(text.decode())
    except (OSError, ValueError, RecursionError) as err:  # all that is no TOML is a ValueError, or too deep
        why = (isinstance(err, OSError) and err.strerror) or str(err)
        raise UsageError(f"the configuration {path} can't be read: {why:.500}") from err
    _only(content, {"defaults", "vm"}, path, "at the top")
    defaults = _table(content.get("defaults", {}), path, "[defaults]")
    _check(defaults, _SETTINGS, path, "[defaults]")
    vms = _table(content.get("vm", {}), path, "[vm]")
    for name, settings in vms.items():
        _check(_table(settings, path, f"[vm.{name}]"), _OF_VM, path, f"[vm.{name}]")
        _check_names(name, settings, path)
    return Config(path, defaults, vms)


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
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UsageError(f"{path}: {name} in {where} must be one of: {', '.join(_CHOICES[name])}")


def _check_names(name: str, settings: dict[str, Any], path: Path) -> None:
    try:
        vm_name(name)
        for stored in _table(settings.get("disks", {}), path, f"[vm.{name}.disks]").values():
            disk_name(stored if isinstance(stored, str) else "")
    except InvalidName as err:
        raise UsageError(f"{path}: [vm.{name}]: {err.message}") from err


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
