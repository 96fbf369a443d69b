# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl restore-test` around the test itself: what it writes, and what it refuses before."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from backupctl.cli import crash_log
from backupctl.cli import restore_test as command
from backupctl.cli.main import cli
from backupctl.errors import BackupctlError, RestoreTestFailed, UsageError
from backupctl.operations import restore_test as core
from backupctl.operations.restore_test import RestoreTestReport
from tests.unit.points import P1, Builder, disk_entry


@pytest.fixture
def tested(builder: Builder, monkeypatch) -> list[object]:
    """A VM that never boots; gets what is tested."""
    builder.point(P1, (disk_entry(), [(0, b"a")]))
    asked: list[object] = []

    def test(request, _reporter, _stop) -> RestoreTestReport:
        asked.append(request)
        error = RestoreTestFailed("it did not boot", hint="look")
        return RestoreTestReport(request.directory.name, P1, "login", 1.0, "tcg", error, b"panic", b"")

    monkeypatch.setattr(core, "test", test)
    return asked


def call(builder: Builder, *words: object) -> tuple[dict, BaseException | None]:
    given = ("restore-test", "vm1", P1, *map(str, words), "--repository", str(builder.repository.path))
    done = CliRunner().invoke(cli, [*given, "--json"])
    return json.loads(done.stdout) if done.stdout else {}, done.exception


def test_of_the_consoles_of_failed_tests_a_few_stay(builder, tested, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    made = [Path(call(builder)[0]["console"]) for _ in range(crash_log.MOST + 2)]
    assert {*crash_log.ours(command.CONSOLE)} == {*made[-crash_log.MOST :]}
    assert made[-1].read_bytes() == b"panic"
    assert made[-1].stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("option", ["--console", "--screenshot"])
def test_a_file_that_could_not_be_written_is_refused_before_the_test(builder, tested, tmp_path, option):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    wrong = {"none/file": "there is no directory"}
    if os.geteuid() == 0:
        wrong["open/file"] = "is not safe for root"
    for target, why in wrong.items():
        _, error = call(builder, option, tmp_path / target)
        assert isinstance(error, UsageError)
        assert why in error.message
        assert error.state == "nothing was touched"
    assert tested == []
    _, error = call(builder, "--console", tmp_path / "file")
    assert isinstance(error, BackupctlError)
    assert f"what its console showed is in {tmp_path / 'file'}" in error.hint
