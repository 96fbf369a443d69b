# SPDX-License-Identifier: GPL-2.0-or-later
"""Points on the command line: by the beginning of an id, by `latest~N`, by --at."""

import json

import pytest

from backupctl.repository.repository import Repository
from tests.screens.terminal import Look, look_at
from tests.unit.points import P1, P2, Builder, disk_entry

PIPE = Look(0, "utf-8", False)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a command on a repository with two points of vm1; returns its document, or what it printed."""
    builder = Builder(Repository.create(tmp_path / "r"))
    for point in (P1, P2):
        builder.point(point, (disk_entry(), [(0, b"x")]))
    (tmp_path / "c.toml").write_text("[vm.20260102]\n")

    def call(*words: str):
        where = ("--config", str(tmp_path / "c.toml"), "--repository", str(tmp_path / "r"))
        seen = look_at([*words, *where, "--json"], PIPE, monkeypatch)
        return json.loads(seen.partition("stdout:\n")[2].partition("stderr:\n")[0]), seen

    return call


@pytest.mark.parametrize(
    ("words", "point"),
    [
        (("20260101",), P1),
        (("latest~1",), P1),
        (("latest",), P2),
        (("--at", "2026-01-01 12:00 UTC"), P1),
        (("--at", "2026-01-02 00:00 UTC"), P2),
    ],
)
def test_show_takes_every_name_of_a_point(call, words, point):
    assert call("show", "vm1", *words)[0]["point"] == point


def test_what_is_missing_doubled_or_ambiguous_is_an_error(call):
    assert "Missing argument 'POINT'" in call("protect", "vm1")[1]
    assert "mutually exclusive" in call("show", "vm1", "latest", "--at", "2026-01-01 12:00")[1]
    error = call("show", "vm1", "2026")[0]["error"]
    assert (error["kind"], error["exit_code"]) == ("AmbiguousPoint", 2)
    assert "is not a date and a time" in call("show", "vm1", "--at", "noon")[1]


def test_a_diff_from_a_time_goes_to_the_newest_point(call):
    found = call("diff", "vm1", "--at", "2026-01-01 12:00 UTC")[0]
    assert (found["before"], found["after"]) == (P1, P2)
    found = call("diff", "vm1", "--at", "2026-01-02 12:00 UTC", "latest~1")[0]
    assert (found["before"], found["after"]) == (P2, P1)
    assert "BEFORE is missing" in call("diff", "vm1")[1]


def test_verify_takes_the_beginning_of_an_id_unless_a_vm_is_called_so(call):
    assert call("verify", "vm1", "20260101", "--fast")[0]["points"] == 1
    assert call("verify", "vm1", "--at", "2026-01-01 12:00 UTC", "--fast")[0]["points"] == 1
    assert "--at needs one NAME" in call("verify", "--at", "2026-01-01 12:00 UTC")[1]
    assert call("verify", "vm1", "20260102", "--fast")[0]["points"] == 2
