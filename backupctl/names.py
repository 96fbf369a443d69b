# SPDX-License-Identifier: GPL-2.0-or-later
"""The names that tie QEMU and the repository together, each a type of its own.

The name of a bitmap is its state: ``backupctl-<first 8 of the repository's id>-<point>-<disk>`` records what
changed on a disk since that point of that repository. Everything else that we make in QEMU is called
``backupctl-<first 8>-<what><disk's number>``; QEMU allows 31 characters for a node's name.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Literal, NewType

from backupctl.errors import InvalidName, RepositoryError

VmName = NewType("VmName", str)
DiskName = NewType("DiskName", str)
PointId = NewType("PointId", str)  # "20261123T041500Z"
RepositoryId = NewType("RepositoryId", str)  # 32 hexadecimal digits
NodeName = NewType("NodeName", str)
BitmapName = NewType("BitmapName", str)

PREFIX = "backupctl-"
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", re.ASCII)
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]", re.ASCII)
_MOST_OF_A_NAME = 80
_POINT = re.compile(r"[0-9]{8}T[0-9]{6}Z", re.ASCII)
_BITMAP = re.compile(rf"{PREFIX}([0-9a-f]{{8}})-([0-9]{{8}}T[0-9]{{6}}Z)(-{_SAFE.pattern})?", re.ASCII)
_UNION = re.compile(rf"{PREFIX}([0-9a-f]{{8}})-since", re.ASCII)
_TAKEN = ("lost+found", "repository.json")
"""Names that a repository's directory has already: of what fsck finds, and of what we put there."""
_POINT_FORMAT = "%Y%m%dT%H%M%SZ"

FileKind = Literal["domain", "qemu", "images", "variables", "tpm", "included"]
"""What a file of a definition is: the XML of libvirt, what QEMU tells, the images of a VM that is off, UEFI
variables, the state of a TPM, a file that the user named."""


def vm_name(text: str) -> VmName:
    """Check a VM's name, which becomes a directory's name. Raises InvalidName."""
    return VmName(_checked(text, "VM name"))


def disk_name(text: str) -> DiskName:
    """Check a disk's name, which becomes part of a file's name. Raises InvalidName."""
    return DiskName(_checked(text, "disk name"))


def file_name(text: str) -> str:
    """Check the name of a file of the VM's definition in a point. Raises InvalidName."""
    return _checked(text, "file name")


def safe_file_name(text: str) -> str:
    """Return a name that `file_name` accepts, as close to `text` as can be."""
    kept = _UNSAFE.sub("-", text)[:_MOST_OF_A_NAME].lstrip("._+-") or "file"
    return f"{kept}-" if kept.endswith(".partial") or kept in _TAKEN else kept


@lru_cache(1 << 16)  # a prune looks at the names of all points after each step
def point_id(text: str) -> PointId:
    """Check a point's id, which becomes a directory's name. Raises InvalidName."""
    try:
        if _POINT.fullmatch(text) and datetime.fromisoformat(text):
            return PointId(text)
    except ValueError:
        pass
    raise InvalidName(f"{text!r:.120} is not the id of a recovery point; ids look like 20261123T041500Z")


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the name that is closest to a text; "" if none is close."""
    import difflib  # noqa: PLC0415 - only for mistakes; it is a hundredth of a run's start

    close = difflib.get_close_matches(text, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def next_point_id(now: datetime, newest: PointId | None) -> PointId:
    """Return an id for a point made at `now` that sorts after `newest`.

    Ids order the chain, so a clock that was set back must not sort a new point before its parent:
    then the id is one second past the newest; the manifest has the clock's own times.
    Raises RepositoryError.
    """
    moment = now.astimezone(UTC).replace(microsecond=0)
    if newest is not None:
        try:
            moment = max(moment, point_time(newest) + timedelta(seconds=1))
        except OverflowError as err:
            raise RepositoryError(f"no point can follow {newest}: the year would be 10000") from err
    return PointId(moment.strftime(_POINT_FORMAT))


def point_time(point: PointId) -> datetime:
    """Return the time in a point's id, in UTC."""
    return datetime.fromisoformat(point)  # strptime would load two modules for it


@dataclass(frozen=True)
class BitmapParts:
    """What the name of a bitmap says. point: None, and disk "", for the temporary one of a differential."""

    tag: str
    point: PointId | None
    disk: str


def bitmap_parts(text: str) -> BitmapParts | None:
    """Parse the name of a bitmap of any repository; None if it is not one of backupctl's names."""
    if match := _UNION.fullmatch(text):
        return BitmapParts(match[1], None, "")
    match = _BITMAP.fullmatch(text)
    return BitmapParts(match[1], PointId(match[2]), (match[3] or "")[1:]) if match else None


class NodeKind(StrEnum):
    """What a node, job, export, or other object of ours in QEMU is for.

    The nodes come first, in the order in which they are removed: each is on top of those after it.
    """

    ACCESS = "acc"  # snapshot-access, on the filter
    FILTER = "cbw"  # copy-before-write, on the scratch node
    SCRATCH = "tmp"  # the empty qcow2
    FILE = "fil"  # the scratch node's file; QEMU removes it with that node
    JOB = "job"
    LIMIT = "lim"  # the throttle group below the scratch node
    EXPORT = "exp"
    SERVER = "nbd"  # the descriptor that the NBD server listens on


_OBJECT = re.compile(rf"({PREFIX}[0-9a-f]{{8}}-)({'|'.join(NodeKind)})([0-9]+)", re.ASCII)
_OURS = re.compile(rf"{PREFIX}[0-9a-f]{{8}}-.+", re.ASCII | re.DOTALL)


def is_ours(name: str) -> bool:
    """Whether a run of any repository gave this name, to something in QEMU or to a temporary file.

    That it begins with `PREFIX` is not enough: a user may call an image `backupctl-server.qcow2`.
    """
    return _OURS.fullmatch(name) is not None


def node_parts(name: str) -> tuple[NodeKind, int] | None:
    """Return what an object of ours is for, and the number of its disk; None for any other name."""
    match = _OBJECT.fullmatch(name)
    return (NodeKind(match[2]), int(match[3])) if match else None


def sibling(name: str, kind: NodeKind) -> NodeName:
    """Name the object of another kind that belongs to the same disk. Raises ValueError for a foreign name."""
    match = _OBJECT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r:.120} is not a name of backupctl")
    return NodeName(f"{match[1]}{kind}{match[3]}")


def removal_order(name: str) -> tuple[int, int, str]:
    """Sort nodes of ours by this: a node before those that it is on top of. Unknown kinds come last."""
    parts = node_parts(name)
    return (list(NodeKind).index(parts[0]), parts[1], name) if parts else (len(NodeKind), 0, name)


@dataclass(frozen=True)
class Namespace:
    """The names of what one repository has in QEMU.

    tag: the first 8 hexadecimal digits of the repository's id.
    """

    tag: str

    @property
    def prefix(self) -> str:
        """How each name begins."""
        return f"{PREFIX}{self.tag}-"

    @classmethod
    def of(cls, repository: RepositoryId) -> "Namespace":
        """Return the namespace of a repository."""
        return cls(repository[:8])

    def bitmap(self, point: PointId, disk: DiskName) -> BitmapName:
        """Name the bitmap that records what changed on a disk since `point`.

        The disk is part of the name because a bitmap moves with its image: if two images changed places, each
        bitmap would otherwise be used for the other disk.
        """
        return BitmapName(f"{self.prefix}{point}-{disk}")

    def point_of(self, bitmap: str) -> PointId | None:
        """Return the point since which a bitmap of ours records; None for a bitmap of anybody else."""
        match = _BITMAP.fullmatch(bitmap)
        return PointId(match[2]) if match and match[1] == self.tag else None

    @property
    def differential_bitmap(self) -> BitmapName:
        """Name the temporary bitmap into which a differential merges those of several points."""
        return BitmapName(f"{self.prefix}since")

    def node(self, kind: NodeKind, number: int) -> NodeName:
        """Name a node, job or export of ours for the disk of that number."""
        return NodeName(f"{self.prefix}{kind}{number}")

    def owns(self, name: str) -> bool:
        """Whether a node, job, export or descriptor set of that name was made for this repository."""
        return name.startswith(self.prefix)


def _checked(text: str, what: str) -> str:
    if text in _TAKEN:
        raise InvalidName(f"invalid {what} {text!r}: a repository or its file system uses this name already")
    if not _SAFE.fullmatch(text) or text.endswith(".partial"):
        raise InvalidName(
            f"invalid {what} {text!r:.120}: letters, digits and ._+- only, "
            "the first a letter or digit, at most 100 characters"
        )
    return text
