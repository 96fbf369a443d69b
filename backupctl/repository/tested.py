# SPDX-License-Identifier: GPL-2.0-or-later
"""`restore-test.json` in a VM's directory: what the last restore tests came to.

It decides when the next one is due, and nothing else. A file that is lost or damaged makes one due now.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from backupctl.errors import RepositoryError
from backupctl.names import PointId, point_id
from backupctl.repository import strict_json
from backupctl.repository.strict_json import Document, ShortText
from backupctl.system import durable, safe_open

FILE_NAME = "restore-test.json"
FORMAT = 1
_MAX_BYTES = 1 << 16
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class RestoreTests(Document):
    """The last test: of which point, when (UTC), and whether that booted. last_passed: the last that did."""

    point: PointId
    time: ShortText
    passed: bool
    last_passed: ShortText | None

    def check(self) -> None:
        """Check what types do not say. Raises InvalidName, ValueError."""
        point_id(self.point)
        for text in filter(None, (self.time, self.last_passed)):
            _parse(text)

    @property
    def passed_at(self) -> datetime | None:
        """When a point booted last."""
        return _parse(self.last_passed) if self.last_passed else None


def read(directory: Path) -> RestoreTests | None:
    """Read what is known of a VM; None if there is nothing that can be believed.

    Raises RepositoryUnreadable.
    """
    try:
        content = safe_open.read(directory / FILE_NAME, _MAX_BYTES)
        return strict_json.read(content, RestoreTests, FILE_NAME, FORMAT, signed=True)
    except (safe_open.NotThere, strict_json.Malformed):
        return None


def record(directory: Path, point: PointId, now: datetime, *, passed: bool) -> RestoreTests:
    """Record a test, durably. Raises RepositoryError."""
    before = read(directory)
    time = f"{now.astimezone(UTC):{_TIME}}"
    last_passed = before.last_passed if before else None
    found = RestoreTests(point, time, passed, time if passed else last_passed)
    fields = {"format": FORMAT, **asdict(found)}
    content = json.dumps({**fields, "checksum": strict_json.checksum(fields)}, indent=2) + "\n"
    try:
        durable.replace(directory / FILE_NAME, content.encode())
    except OSError as err:
        raise RepositoryError(f"cannot write {directory / FILE_NAME}: {err.strerror}") from err
    return found


def _parse(text: str) -> datetime:
    return datetime.strptime(text, _TIME).replace(tzinfo=UTC)
