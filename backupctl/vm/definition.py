# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM is, beside its disks: the files that a lost host is rebuilt from.

A driver gives them as files that a person can read. What cannot be found out is left out, and said; it never
fails a backup. A file that the user named is different: without it the run does not begin.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.names import FileKind, safe_file_name
from backupctl.sizes import MAX_DEFINITION_FILE_BYTES, MAX_INCLUDED_BYTES, MAX_INCLUDED_FILES
from backupctl.system.bounded_read import Unusable

FLASH_CHIP = re.compile(r"/machine/(?:\w+\.)?flash\d+", re.ASCII)
"""How `query-block` names the flash chips of a machine (`system.flash1`, `virt.flash1`); a writable one has
UEFI's variables."""

Read = Callable[[Path, int], bytes]
"""Reads a plain file of the VM's host, of at most so many bytes. Raises bounded_read.Unusable."""


@dataclass(frozen=True)
class DefinitionFile:
    """One file. name: as a point stores it. origin: its path on the VM's host, "" for what was asked for."""

    kind: FileKind
    name: str
    origin: str
    content: bytes


@dataclass(frozen=True)
class Definition:
    """What is known of a VM. omitted: what could not be found out, and why, each as a sentence."""

    files: tuple[DefinitionFile, ...] = ()
    omitted: tuple[str, ...] = ()

    def __add__(self, other: "Definition") -> "Definition":
        """Return what both have."""
        return Definition((*self.files, *other.files), (*self.omitted, *other.omitted))


class _Block(msgspec.Struct):
    qdev: str = ""
    node: str = ""


class _Told(msgspec.Struct):
    block: list[_Block] | None = None


def flash_nodes(content: bytes) -> frozenset[str]:
    """Return the nodes of flash chips that a file of kind "qemu" tells of; none if it is of a later form."""
    try:
        told = msgspec.json.decode(content, type=_Told)
    except msgspec.DecodeError:
        return frozenset()
    return frozenset(one.node for one in told.block or () if FLASH_CHIP.fullmatch(one.qdev))


def included(paths: Sequence[Path], read: Read) -> Definition:
    """Read the files that the user named. Raises UsageError for one that cannot be read, MonitorError."""
    named = tuple(dict.fromkeys(paths))
    if len(named) > MAX_INCLUDED_FILES:
        raise _refused(f"{len(named)} files are to be included, and at most {MAX_INCLUDED_FILES} are stored")
    found: list[DefinitionFile] = []
    for number, path in enumerate(named, 1):
        try:
            content = read(path, MAX_DEFINITION_FILE_BYTES)
        except Unusable as err:
            raise _refused(str(err)) from err
        name = f"included-{number}-{safe_file_name(path.name)}"
        found.append(DefinitionFile("included", name, str(path), content))
        if sum(len(one.content) for one in found) > MAX_INCLUDED_BYTES:
            raise _refused(f"the files to include are larger than {MAX_INCLUDED_BYTES >> 20} MiB together")
    return Definition(tuple(found))


def _refused(why: str) -> UsageError:
    return UsageError(
        why, state=UNTOUCHED, hint="include_files and --include-file name plain files of the VM's host"
    )


def state_file(
    kind: FileKind, name: str, path: Path, read: Read, most_bytes: int = MAX_DEFINITION_FILE_BYTES
) -> Definition:
    """Read a file with a state of the VM; one that cannot be read is left out. Raises MonitorError."""
    try:
        content = read(path, most_bytes)
    except Unusable as err:
        return Definition(omitted=(str(err),))
    return Definition((DefinitionFile(kind, name, str(path), content),))
