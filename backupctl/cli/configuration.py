# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file `backupctl.toml`: where it is found, and what it says of a VM.

::

    [defaults]                       what holds for every VM
    repository = "/backup"

    [run]                            how `backupctl run` goes about it
    jobs = 4

    [vm.web]
    qmp = "unix:/run/qemu/web.qmp"
    agent = "unix:/run/qemu/web.agent"
    [vm.web.disks]                   QEMU's name of a disk = the name it is stored under
    virtio0 = "system"

Looked for in: ``--config``, ``$BACKUPCTL_CONFIG``, the user's and the system's configuration directory; never
in the current directory, and believed only if nobody else could have written it (`trusted.py`). What it may
hold is in `settings.py`; the command line overrides it by click's own rules (`vm_argument.named`).
"""

import os
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from backupctl.cli import param_types, settings, settings_check
from backupctl.cli.settings import File, VmSettings
from backupctl.cli.settings_check import Mistake
from backupctl.cli.toml_lines import Key, key_lines
from backupctl.errors import UsageError
from backupctl.system import trusted

FILE_NAME = "backupctl.toml"
SYSTEM_FILE = Path("/etc/backupctl") / FILE_NAME
ENVIRONMENT = "BACKUPCTL_CONFIG"
MAX_BYTES = 256 * 1024


@dataclass(frozen=True)
class Config:
    """What the configuration file says; empty if there is none.

    path: where it was found. text: its content, as far as it is TOML. mistakes: what is wrong in it; only
    `examine` returns a Config that has any.
    """

    path: Path | None = None
    content: File = field(default_factory=File)
    text: str = ""
    mistakes: tuple[Mistake, ...] = ()

    @property
    def file(self) -> str | None:
        """Where it was found, for people and programs."""
        return str(self.path) if self.path else None

    @property
    def vms(self) -> tuple[str, ...]:
        """Return the names of the VMs, in the file's order."""
        return tuple(self.content.vm)

    def of(self, vm: str | None) -> VmSettings:
        """Return what the file says of a VM: its own settings, or else those for all."""
        own = self.content.vm.get(vm or "", VmSettings())
        tables = {name: _over(getattr(self.content, name), getattr(own, name)) for name in settings.TABLES}
        said = {**msgspec.to_builtins(self.content.defaults), **msgspec.to_builtins(own), **tables}
        return VmSettings(**said)

    def line(self, vm: str | None, name: str, table: str = "") -> int:
        """Return the line on which a setting stands: the VM's own, or the one for all; 0 for none.

        table: the one that it is in, if not [vm.NAME] itself.
        """
        general = [(table, name)] if table else [("defaults", name), ("run", name)]
        places = [("vm", vm or "", *filter(None, [table]), name), *general]
        return next((self._lines[place] for place in places if place in self._lines), 0)

    @cached_property
    def _lines(self) -> dict[Key, int]:
        return key_lines(self.text)

    def repositories(self) -> tuple[Path, ...]:
        """Return the directory of each repository that the file names, in its order."""
        named = (self.content.defaults.repository, *(self.of(vm).repository for vm in self.vms))
        return tuple(dict.fromkeys(param_types.absolute(one) for one in named if one))


def _over(general: msgspec.Struct, own: msgspec.Struct) -> msgspec.Struct:
    """Return the settings of one table for a VM: each key its own, or else the one for all."""
    said = {name: getattr(own, name) for name in own.__struct_fields__}
    return msgspec.structs.replace(
        general, **{name: value for name, value in said.items() if value is not None}
    )


def load(given: str | None) -> Config:
    """Find and read the configuration file. Raises UsageError, also for a mistake in it.

    given: the file that --config or $BACKUPCTL_CONFIG names.
    """
    found = examine(given)
    if found.mistakes:
        raise UsageError(
            f"{found.path}: {'; '.join(map(str, found.mistakes))}", next_command="backupctl config check"
        )
    return found


def examine(given: str | None) -> Config:
    """Find and read the configuration file, with all mistakes in it.

    Raises UsageError if it cannot be read, is not TOML, or is not trusted.
    """
    places = (_absolute(given),) if given else filter(_is_there, _places())
    place = next(iter(places), None)
    return _read(place) if place else Config()


def _absolute(text: str) -> Path:
    try:
        return param_types.absolute(text)
    except UsageError as err:
        raise UsageError(f"the configuration: {err.message}", next_command=err.next_command) from err


def _is_there(place: Path) -> bool:
    """Whether there is anything, trusted or not. Raises UsageError if that cannot be found out."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as err:
        raise _unreadable(place, err) from err
    return True


def _places() -> Iterator[Path]:
    """Yield the files to look for; never one that depends on where backupctl was started."""
    user = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    with suppress(RuntimeError):  # there is no home
        user = user.expanduser()
    if user.is_absolute():
        yield user / "backupctl" / FILE_NAME
    yield SYSTEM_FILE


def _read(path: Path) -> Config:
    """Read a file. Raises UsageError."""
    try:
        read = trusted.read(path, MAX_BYTES)
        if len(read) > MAX_BYTES:
            raise UsageError(f"the configuration {path} is larger than {MAX_BYTES >> 10} KiB")
        text = read.decode()
        content: dict[str, Any] = tomllib.loads(text)
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as err:  # what is not TOML is a ValueError, or nested too deep
        raise _unreadable(path, err) from err
    found, mistakes = settings_check.check(content, text)
    return Config(path, found, text, tuple(mistakes))


def _unreadable(path: Path, err: Exception) -> UsageError:
    why = (isinstance(err, OSError) and err.strerror) or str(err)
    return UsageError(f"cannot read the configuration {path}: {why:.500}")
