# SPDX-License-Identifier: GPL-2.0-or-later
"""What the systemd units of nightly backups contain: the shipped files, and a drop-in with the paths of VMs.

A unit runs with a read-only file system, so each path that backupctl writes to is named in the drop-in
(systemd.exec(5), ReadWritePaths=). So are the mounts without which it must not start: a repository whose file
system is not mounted looks like an empty directory (systemd.unit(5), RequiresMountsFor=).
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.names import VmName

PROGRAM = "/usr/bin/backupctl"
"""What the shipped units call."""
DROP_IN = "paths.conf"
FAILED = "backupctl-failed@.service"
_STAMP = "# Written by `backupctl install-timers`, which leaves the file alone once it is edited: "
_INSTANCE = re.compile(r"[A-Za-z0-9:_.-]+", re.ASCII)  # systemd.unit(5); others would have to be escaped


@dataclass(frozen=True)
class Unit:
    """A file below the directory of units. name: of a drop-in, with the directory that it is in."""

    name: str
    content: str

    def stamped(self) -> bytes:
        """Return the content with a last line by which `is_unedited` knows it."""
        return f"{self.content}{_STAMP}{_digest(self.content)}\n".encode()


@dataclass(frozen=True)
class Paths:
    """Where backups of VMs write, and what the units must say of it.

    written: repositories, scratch directories and others; one may come several times.
    configuration: the file to use; None for the one that is found without being named.
    """

    written: tuple[Path, ...]
    configuration: Path | None = None

    def drop_in(self) -> str:
        """Return the drop-in of a service. Raises UsageError for a path that a unit cannot contain."""
        named = (
            [f"Environment={_quoted(f'BACKUPCTL_CONFIG={self.configuration}')}"] if self.configuration else []
        )
        # `-`: without it systemd would not start the unit for want of a directory, and could not say why.
        written = tuple(dict.fromkeys(self.written))
        return "\n".join(
            [
                "# SPDX-License-Identifier: GPL-2.0-or-later",
                "[Unit]",
                f"RequiresMountsFor={_words(map(str, written))}",
                "",
                "[Service]",
                f"ReadWritePaths={_words(f'-{path}' for path in written)}",
                *named,
                "",
            ]
        )


def for_all(paths: Paths, program: str) -> tuple[Unit, ...]:
    """Return the units of one timer for all VMs. program: the path of backupctl. Raises UsageError."""
    return (
        _shipped("backupctl.service", program),
        _shipped("backupctl.timer", program),
        Unit(f"backupctl.service.d/{DROP_IN}", paths.drop_in()),
        _shipped(FAILED, program),
    )


def for_each(vms: dict[VmName, Paths], program: str) -> tuple[Unit, ...]:
    """Return the units of a timer for each VM. Raises UsageError for a name that no unit can have."""
    for vm in vms:
        if not _INSTANCE.fullmatch(vm):
            raise UsageError(
                f"VM {vm!r} cannot have a timer of its own: its name cannot be part of the name of a unit",
                state=UNTOUCHED,
                hint="install one timer for all VMs, without NAME",
            )
    drop_ins = (Unit(f"{service(vm)}.d/{DROP_IN}", paths.drop_in()) for vm, paths in vms.items())
    return (
        _shipped("backupctl@.service", program),
        _shipped("backupctl@.timer", program),
        *drop_ins,
        _shipped(FAILED, program),
    )


def service(vm: VmName) -> str:
    """Return the name of the service that backs up one VM."""
    return f"backupctl@{vm}.service"


def is_ours(content: bytes) -> bool:
    """Whether `install-timers` wrote a file, whatever happened to it since."""
    return _STAMP.encode() in content


def is_unedited(content: bytes) -> bool:
    """Whether a file is as `install-timers` wrote it."""
    body, stamp, digest = content.decode(errors="replace").rpartition(_STAMP)
    return bool(stamp) and digest == f"{_digest(body)}\n"


def _shipped(name: str, program: str) -> Unit:
    """Return a shipped unit that calls this backupctl."""
    content = (resources.files(__package__) / "systemd" / name).read_text(encoding="utf-8")
    called = _quoted(program.replace("$", "$$")) if program != PROGRAM else PROGRAM
    return Unit(name, content.replace(f"{PROGRAM} ", f"{called} "))


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _words(words: Iterable[str]) -> str:
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """Return a word as systemd reads it back (systemd.syntax(7)). Raises UsageError."""
    if not word.isprintable():
        raise UsageError(f"{word!r:.200} cannot be written to a systemd unit", state=UNTOUCHED)
    word = word.replace("%", "%%")  # which else is a specifier (systemd.unit(5))
    if not re.search(r"""[\s"'\\;]""", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
