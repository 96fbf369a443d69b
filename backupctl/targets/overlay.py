# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of the user's own that stand on a point's image, by its absolute path.

The point below is only read, by QEMU itself and under the name that the overlay stores. So it must stay
where it is, and as it is, for as long as the overlay is used.
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
    """Make an empty overlay, durably; after a death the target is absent (or as before), or complete.

    chain: newest first. warn: told what of a replaced file could not be kept.
    Raises UsageError if QEMU could not open it by the links that the images name,
    TargetExists, Locked, WriteFailed, OSError.
    """
    _refuse_too_deep(chain)
    with output.file(target, force=force, warn=warn) as temporary:
        create.create_layer(temporary, size_bytes, str(chain[0].resolve()))  # written down, not opened


def _refuse_too_deep(chain: Sequence[Path]) -> None:
    """Refuse a chain whose oldest image QEMU could not name: it puts each relative link behind the last."""
    name = str(chain[0].resolve())
    for path in chain[1:]:
        name = f"{name.rpartition('/')[0]}/../{path.parent.name}/{path.name}"
    if len(os.fsencode(name)) >= os.pathconf("/", "PC_PATH_MAX"):
        raise UsageError(
            f"QEMU can't follow the links of {len(chain)} layers from {chain[0]}, so nothing stands on it: "
            "take a whole restore",
            state=UNTOUCHED,
        )


def stands_on(image: OpenImage, size_bytes: int, chain: Sequence[Path]) -> bool:
    """Whether an image is an overlay of just this chain's newest image (a relative name is none of ours)."""
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
    """Make an overlay, or take one that was made here for the same point, with what was written to it.

    It is open until the block ends. Raises UsageError, TargetExists, Locked, WriteFailed, OSError.
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
        if not stands_on(image, size_bytes, chain):
            raise _other(target)
        yield image


def _other(target: Path) -> TargetExists:
    return TargetExists(
        f"{target} exists, and is no overlay of this point",
        state=UNTOUCHED,
        hint="name a new file",
    )
