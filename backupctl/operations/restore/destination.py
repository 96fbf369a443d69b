# SPDX-License-Identifier: GPL-2.0-or-later
"""What `restore --to` names: where each disk goes, and as what kind of image.

One rule. What exists is taken for what it is. Of what does not exist, a name that ends in "/" or has no
suffix is a new directory, which gets DIR/<disk>.<format>; .qcow2, .raw and .img name a file of that format;
any other suffix names a file only together with `--format`. The parent directory must exist.

A suffix chooses the format that is WRITTEN. The format of an existing image is taken from `--format` or from
the manifest, and never from its name or its content: a guest could make a raw disk look like a qcow2 image
that leads QEMU to a file of the host.
"""

import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from backupctl.errors import UNTOUCHED, TargetExists, UsageError
from backupctl.images.create import ImageFormat
from backupctl.repository.manifest import DiskEntry

STDOUT = "-"
_SUFFIXES: dict[str, ImageFormat] = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}
_FOREIGN = {".vmdk", ".vdi", ".vhd", ".vhdx", ".vpc", ".qed", ".ova"}
_IN_THE_VM: dict[str, ImageFormat] = {"qcow2": "qcow2", "raw": "raw", "file": "raw", "host_device": "raw"}


def of_new(entry: DiskEntry, to: str, wanted: ImageFormat | None) -> tuple[str, ImageFormat]:
    """Return where a new image of a disk goes, and its format. wanted: what `--format` names.

    An existing file whose suffix names no format is replaced by an image of the format that the disk had in
    the VM. Raises UsageError.
    """
    if to == STDOUT or Path(to).is_block_device():
        return to, wanted or "raw"
    if is_directory(to):
        kind: ImageFormat = wanted or "qcow2"
        return str(Path(to) / f"{entry.name}.{kind}"), kind
    return to, wanted or _suffixed(entry, Path(to))


def of_existing(entry: DiskEntry, to: str, wanted: ImageFormat | None) -> tuple[str, ImageFormat]:
    """Return which existing image of a disk is to be changed, and its format. Raises UsageError."""
    if to == STDOUT:
        raise UsageError("--only-changed needs an existing image, not standard output", state=UNTOUCHED)
    if Path(to).is_block_device():
        return to, wanted or "raw"
    kind = wanted or in_the_vm(entry)
    return (str(Path(to) / f"{entry.name}.{kind}") if is_directory(to) else to), kind


def is_directory(to: str) -> bool:
    """Whether a name is that of a directory, which exists or is to be made."""
    path = Path(to)
    return path.is_dir() or to.endswith("/") or not (os.path.lexists(path) or path.suffix)


def in_the_vm(entry: DiskEntry) -> ImageFormat:
    """Return the format of the disk's image in the VM, from the manifest. Raises UsageError."""
    try:
        return _IN_THE_VM[entry.format]
    except KeyError as err:
        raise UsageError(
            f"the format of {entry.name} is not known: in the VM it was a {entry.format!r:.60} disk",
            state=UNTOUCHED,
            hint="specify the format of the image: --format qcow2 or --format raw",
        ) from err


def _suffixed(entry: DiskEntry, path: Path) -> ImageFormat:
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if os.path.lexists(path) and suffix not in _FOREIGN:
        return in_the_vm(entry)
    raise UsageError(
        f"{path}: {path.suffix!r:.60} names no image format that backupctl writes (qcow2, raw)",
        state=UNTOUCHED,
        hint=f"use --to {path.with_suffix('.qcow2')} or .raw or .img; --to {path}/ for a directory",
    )


def refuse_one_for_all(targets: Sequence[str], disks: Sequence[str]) -> None:
    """Refuse one target for several disks. Raises UsageError."""
    if len(set(targets)) < len(targets):
        raise UsageError(
            f"one target, but there are several disks ({', '.join(disks)}): use --disk, or name a directory",
            state=UNTOUCHED,
        )


def refuse_unplaceable(to: str, target: Path) -> None:
    """Refuse a file that cannot be made, or in whose place something else is.

    to: what the user named; target: the file that results from it. Raises UsageError,
    TargetExists.
    """
    above = (
        Path(to).absolute().parent if is_directory(to) and not Path(to).is_dir() else target.absolute().parent
    )
    if not above.is_dir():
        what = "is not a directory" if os.path.lexists(above) else "does not exist"
        raise UsageError(
            f"cannot make {target}: the directory {above} {what}",
            state=UNTOUCHED,
            hint="create the directory, then restore again",
            next_command=f"mkdir -p {shlex.quote(str(above))}",
        )
    if os.path.lexists(target):
        _require_plain_file(target)


def _require_plain_file(target: Path) -> None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        raise TargetExists(f"{target} is a dangling symbolic link", state=UNTOUCHED) from None
    except OSError as err:
        raise UsageError(f"cannot stat {target}: {err.strerror}", state=UNTOUCHED) from err
    if not stat.S_ISREG(mode):
        raise TargetExists(
            f"{target} is {_kind_of(mode)}, not a file: it is not replaced, even with --force",
            state=UNTOUCHED,
        )


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a character device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
