# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of the user whose backing file is a point's image, by its absolute path.

QEMU reads the point under the name that the overlay stores. So the point must stay where it is, and as it is,
for as long as the overlay is used.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backupctl.errors import UNTOUCHED, DamageFound, TargetExists, UsageError
from backupctl.events import Event
from backupctl.images import create
from backupctl.images.open_image import OpenImage
from backupctl.system import safe_open
from backupctl.targets import output


def make(
    target: Path,
    size_bytes: int,
    chain: Sequence[Path],
    *,
    force: bool,
    warn: Callable[[Event], None] = lambda _event: None,
) -> None:
    """Make an empty overlay, durably; after a crash the target is absent (or as before), or complete.

    chain: newest first. warn: as for `output.file`. Raises UsageError if QEMU could not open it by the
    backing files that the images name, TargetExists, Locked, WriteFailed, OSError.
    """
    _refuse_too_deep(chain)
    with output.file(target, force=force, warn=warn) as temporary:
        create.create_layer(temporary, size_bytes, str(chain[0].resolve()))  # written down, not opened


def _refuse_too_deep(chain: Sequence[Path]) -> None:
    """Refuse a chain whose oldest image QEMU could not open: it joins all relative links into one path."""
    name = str(chain[0].resolve())
    for path in chain[1:]:
        name = f"{name.rpartition('/')[0]}/../{path.parent.name}/{path.name}"
    if len(os.fsencode(name)) >= os.pathconf("/", "PC_PATH_MAX"):
        raise UsageError(
            f"QEMU cannot follow the backing files of {len(chain)} layers from {chain[0]}",
            state=UNTOUCHED,
            hint="restore the whole disk instead",
        )


def is_overlay_of(image: OpenImage, size_bytes: int, chain: Sequence[Path]) -> bool:
    """Whether an image is an overlay of this chain's newest image, by its absolute name as we store it."""
    try:
        found = image.header()
    except DamageFound:
        return False
    wanted = (str(chain[0].resolve()), "qcow2", size_bytes)
    return (found.backing, found.backing_format, found.size) == wanted


@contextmanager
def made_or_taken(
    repository: Path, target: Path, size_bytes: int, chain: Sequence[Path]
) -> Iterator[OpenImage]:
    """Make an overlay, or open one that was made for the same point, with what was written to it.

    It stays open until the block ends. Raises UsageError, TargetExists, Locked, WriteFailed, OSError.
    """
    output.refuse_inside(repository, target)
    place = output.place_of(target, "--writable-overlay")
    if not target.exists():
        make(target, size_bytes, chain, force=False)
    with ExitStack() as held:
        try:
            image = held.enter_context(OpenImage.open(place, writable=True))
        except safe_open.NotThere as err:
            raise _other(target) from err
        if not is_overlay_of(image, size_bytes, chain):
            raise _other(target)
        yield image


def _other(target: Path) -> TargetExists:
    return TargetExists(
        f"{target} exists and is not an overlay of this point",
        state=UNTOUCHED,
        hint="name a new file",
    )
