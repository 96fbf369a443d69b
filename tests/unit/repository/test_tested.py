# SPDX-License-Identifier: GPL-2.0-or-later
"""What the last restore tests came to: kept through failures, and never believed when it is damaged."""

from datetime import UTC, datetime, timedelta

import pytest

from backupctl.errors import RepositoryError
from backupctl.repository import tested
from tests.unit.points import P1, P2

NOW = datetime(2026, 11, 28, 4, 15, tzinfo=UTC)


def test_a_failure_keeps_the_time_of_the_last_success(tmp_path):
    assert tested.read(tmp_path) is None
    tested.record(tmp_path, P1, NOW, passed=True)
    tested.record(tmp_path, P2, NOW + timedelta(days=1), passed=False)
    found = tested.read(tmp_path)
    assert found is not None
    assert (found.point, found.passed, found.passed_at) == (P2, False, NOW)


def test_a_damaged_record_counts_as_none(tmp_path):
    tested.record(tmp_path, P1, NOW, passed=True)
    path = tmp_path / tested.FILE_NAME
    content = path.read_bytes()
    for changed in (b"", content[:-20], content.replace(b"true", b"false"), b"[" * 10_000):
        path.write_bytes(changed)
        assert tested.read(tmp_path) is None
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert tested.read(tmp_path) is None


def test_a_record_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(RepositoryError, match="cannot write"):
        tested.record(tmp_path / "none", P1, NOW, passed=True)
