# SPDX-License-Identifier: GPL-2.0-or-later
"""The names that a VM had before it was renamed in the repository: `former-names` in its directory.

The manifest of a point names its VM, so that no point of another VM passes for one of this. A rename changes
no manifest: it adds the old name here, with the newest point that may bear it, and renames the directory.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from backupctl.errors import DamageFound, InvalidName, RepositoryError
from backupctl.names import PointId, VmName, point_id, vm_name
from backupctl.repository import strict_json
from backupctl.repository.strict_json import Document
from backupctl.system import durable, safe_open

FORMAT = 1
FILE_NAME = "former-names"


@dataclass(frozen=True)
class FormerName:
    """A name, and the newest point that was made under it."""

    name: VmName
    until: PointId


@dataclass(frozen=True)
class _FormerNames(Document):
    """The content of the file, oldest name first."""

    names: tuple[FormerName, ...]

    def check(self) -> None:
        """Check what types do not say. Raises InvalidName."""
        for one in self.names:
            vm_name(one.name)
            point_id(one.until)


def read(directory: Path) -> tuple[FormerName, ...]:
    """Return the former names of a VM, oldest first. Raises DamageFound, RepositoryError."""
    path = directory / FILE_NAME
    try:
        content = safe_open.read(path, strict_json.MAX_BYTES)
    except safe_open.NotPlain as err:
        raise DamageFound(f"cannot read {path}: {err}") from err
    except safe_open.NotThere:
        return ()
    try:
        return _parse(content)
    except strict_json.Malformed as err:
        raise DamageFound(f"{path}: {err}") from err


@lru_cache(16)  # it is asked for each point
def _parse(content: bytes) -> tuple[FormerName, ...]:
    return strict_json.read(content, _FormerNames, FILE_NAME, FORMAT, signed=True).names


def add(directory: Path, name: VmName, until: PointId) -> None:
    """Record, durably, that points up to `until` may bear a name. Raises DamageFound, RepositoryError."""
    known = tuple(one for one in read(directory) if one.name != name)
    fields = {"format": FORMAT, **asdict(_FormerNames((*known, FormerName(name, until))))}
    fields["names"] = list(fields["names"])
    content = json.dumps({**fields, "checksum": strict_json.checksum(fields)}, indent=2) + "\n"
    try:
        durable.replace(directory / FILE_NAME, content.encode())
    except OSError as err:
        raise RepositoryError(f"cannot write {directory / FILE_NAME}: {err.strerror}") from err


def bearer(repository: Path, name: VmName) -> VmName | None:
    """Return the VM of a repository that was once called so, if there is one. Raises RepositoryError."""
    for found in safe_open.directories(repository):
        with suppress(InvalidName, DamageFound):
            if any(one.name == name for one in read(repository / vm_name(found))):
                return vm_name(found)
    return None


def may_bear(directory: Path, point: PointId, name: str) -> bool:
    """Whether a point in a VM's directory may be of a VM of another name. Raises as `read`."""
    return any(one.name == name and point <= one.until for one in read(directory))
