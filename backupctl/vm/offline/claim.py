# SPDX-License-Identifier: GPL-2.0-or-later
"""One backup at a time works on the images of a VM that is off, whoever makes it and wherever it is stored.

Two could read the same images, but the bitmaps of the one that ends first could not be stored while the other
reads: QEMU writes to no image that another process has open. So the second is refused before it reads.
"""

import time
from collections.abc import Sequence

from backupctl.errors import UNTOUCHED, Locked, MonitorUnreachable
from backupctl.system import image_lock
from backupctl.vm.offline.images import DiskImages, OpenFile

PATIENCE_SECONDS = 3.0
"""For a run that was killed, whose program or daemon is about to end."""
_AGAIN_SECONDS = 0.2


def claim(disks: Sequence[DiskImages]) -> None:
    """Keep other backups off the images that store bitmaps, for as long as they are open.

    Waits a little while another has them. Raises Locked, MonitorUnreachable if there are no locks.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    for one in disks:
        if one.format == "qcow2":
            while not _claimed(one.files[0]):
                if time.monotonic() > deadline:
                    raise Locked(
                        f"another backup of {one.path} is under way, perhaps another user's, or one to "
                        "another repository",
                        state=UNTOUCHED,
                        hint="one backup at a time works on an image; try again when the other has ended",
                    )
                time.sleep(_AGAIN_SECONDS)


def _claimed(one: OpenFile) -> bool:
    try:
        return image_lock.claim(one.image.descriptor)
    except OSError as err:
        raise MonitorUnreachable(f"cannot lock {one.image.path}: {err.strerror}", state=UNTOUCHED) from err
