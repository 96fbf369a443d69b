# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes and removes systemd units; a file that somebody else wrote or edited is left alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backupctl.errors import UNTOUCHED, Failed, UsageError
from backupctl.operations.timers import units
from backupctl.operations.timers.units import Unit
from backupctl.system import durable, safe_directory, safe_open

DIRECTORY = Path("/etc/systemd/system")
_MAX_BYTES = 1 << 20
_FILE_MODE, _DIRECTORY_MODE = 0o644, 0o755
"""Readable for all, unlike what else we write: units hold no secrets, and systemd warns of hidden ones."""

Action = Literal["create", "replace", "unchanged", "edited", "remove"]


@dataclass(frozen=True)
class Change:
    """What becomes of a file. content: what is written to it; None if it is removed."""

    path: Path
    action: Action
    content: bytes | None = None


def plan(directory: Path, wanted: Iterable[Unit]) -> tuple[Change, ...]:
    """Compare units with what is there. directory: that of the units. Raises RepositoryUnreadable."""
    return tuple(_change(directory / unit.name, unit.stamped()) for unit in wanted)


def plan_removal(directory: Path) -> tuple[Change, ...]:
    """Return the units to remove: all that `install` ever wrote here.

    Raises UsageError while a timer is enabled: systemd would go on with it until its next start.
    """
    enabled = [path.name for path in directory.glob("*.wants/backupctl*.timer") if path.is_symlink()]
    if enabled:
        raise UsageError(
            f"still enabled: {', '.join(sorted(enabled))}",
            state=UNTOUCHED,
            next_command=f"systemctl disable --now {' '.join(sorted(enabled))}",
        )
    return tuple(
        Change(path, "remove" if units.is_unedited(content) else "edited")
        for path, content in _written(directory)
    )


def carry_out(changes: Iterable[Change], *, force: bool) -> None:
    """Make the changes. force: replace and remove edited files as well.

    Raises UsageError if there are edited files, and nothing was changed; Failed.
    """
    changes = tuple(changes)
    edited = [str(one.path) for one in changes if one.action == "edited"]
    if edited and not force:
        raise UsageError(
            f"not written by backupctl, or edited since: {', '.join(edited)}",
            state=UNTOUCHED,
            hint="--force replaces or removes them",
        )
    try:
        for one in changes:
            if one.content is None:
                _remove(one.path)
            elif one.action != "unchanged":
                _write(one.path, one.content)
    except OSError as err:
        raise Failed(
            f"cannot change {err.filename or one.path}: {err.strerror}",
            state="the units before it are written; run the command again for the rest",
        ) from err


def _change(path: Path, content: bytes) -> Change:
    found = _read(path)
    if found is None and not path.is_symlink():
        return Change(path, "create", content)
    if found is None or not units.is_unedited(found):
        return Change(path, "edited", content)
    return Change(path, "unchanged" if found == content else "replace", content)


def _written(directory: Path) -> Iterator[tuple[Path, bytes]]:
    patterns = ("backupctl*.service", "backupctl*.timer", f"backupctl*.service.d/{units.DROP_IN}")
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        content = _read(path)
        if content is not None and units.is_ours(content):
            yield path, content


def _read(path: Path) -> bytes | None:
    """Read a file; None if it is missing or not a regular one: a masked unit is a link to /dev/null."""
    try:
        return safe_open.read(path, _MAX_BYTES)
    except (safe_open.NotThere, safe_open.NotPlain):
        return None


def _write(path: Path, content: bytes) -> None:
    # As root, nobody else may be able to put another file in the place of a unit that root will run.
    directory = safe_directory.resolve(path.parent)
    for missing in reversed([one for one in (directory, *directory.parents) if not one.exists()]):
        missing.mkdir()
        missing.chmod(_DIRECTORY_MODE)
    durable.replace(directory / path.name, content)
    (directory / path.name).chmod(_FILE_MODE)


def _remove(path: Path) -> None:
    path.unlink()
    durable.sync_directory(path.parent)
    if path.name == units.DROP_IN and not any(path.parent.iterdir()):
        path.parent.rmdir()
