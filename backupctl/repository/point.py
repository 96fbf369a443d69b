# SPDX-License-Identifier: GPL-2.0-or-later
"""A recovery point that is committed."""

from dataclasses import dataclass
from pathlib import Path

from backupctl.names import PointId
from backupctl.repository import markers
from backupctl.repository.manifest import DiskEntry, Manifest


@dataclass(frozen=True)
class Point:
    """A committed recovery point."""

    path: Path
    manifest: Manifest

    @property
    def id(self) -> PointId:
        """Its id, the directory's name."""
        return self.manifest.point

    @property
    def disks(self) -> tuple[DiskEntry, ...]:
        """Its disks."""
        return self.manifest.disks

    @property
    def protected(self) -> bool:
        """Whether no prune drops it. Raises RepositoryError."""
        return markers.has(self.path, markers.PROTECTED)
