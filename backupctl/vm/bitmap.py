# SPDX-License-Identifier: GPL-2.0-or-later
"""A dirty bitmap's state."""

from dataclasses import dataclass

from backupctl.names import BitmapName, NodeName


@dataclass(frozen=True)
class Bitmap:
    """A dirty bitmap as `query-named-block-nodes` shows it. dirty_bytes: QEMU's `count`.

    read_only: whether its node is: a backing layer that an external snapshot left behind, or a medium.
    """

    name: BitmapName
    node: NodeName
    granularity: int
    dirty_bytes: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool
    read_only: bool = False

    @property
    def state(self) -> str:
        """The state in one word, for people."""
        if self.inconsistent:
            return "inconsistent"
        return "recording" if self.recording else "disabled"
