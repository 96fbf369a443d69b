# SPDX-License-Identifier: GPL-2.0-or-later
"""The comparison itself: it must see every kind of difference, and forgive only what is named."""

from pathlib import Path
from typing import Any

import pytest

from tests.conformance import compare, differences, nbdview, scripts, session, subjects
from tests.conformance.normalise import Normaliser
from tests.conformance.session import Transcript

assert scripts.bitmaps  # registers the scripts
OF_REAL_QEMUS = [entry for entry in differences.ALLOWED if {*entry.pair} <= {*subjects.REAL}]
BASE: dict[str, Any] = {"return": {"name": "b0", "count": 1, "list": [1, 2]}}


@pytest.mark.parametrize(
    "other",
    [
        {"return": {"name": "b1", "count": 1, "list": [1, 2]}},
        {"return": {"name": "b0", "count": True, "list": [1, 2]}},
        {"return": {"name": "b0", "count": 1, "list": [1]}},
        {"return": {"name": "b0", "count": 1, "list": [2, 1]}},
        {"return": {"name": "b0", "list": [1, 2]}},
        {"return": {"name": "b0", "count": 1, "list": [1, 2], "more": None}},
        {"error": {"class": "GenericError", "desc": "no"}},
    ],
)
def test_every_kind_of_difference_in_a_reply_is_seen(other: dict[str, Any]) -> None:
    """Value, type, length, order, missing and surplus members."""
    assert compare.transcripts(Transcript([("c", BASE)]), Transcript([("c", other)]))


def test_missing_replies_and_events_are_differences() -> None:
    """A transcript that ends early does not count as equal."""
    whole, short = Transcript([("c", BASE), ("d", BASE)], [{"event": "STOP"}]), Transcript([("c", BASE)])
    assert [each.where for each in compare.transcripts(whole, short)] == ["replies[1 d]", "events[0]"]
    assert len(compare.transcripts(short, whole)) == 2


def test_equal_transcripts_have_no_difference() -> None:
    """Nothing is made up."""
    assert not compare.transcripts(Transcript([("c", BASE)]), Transcript([("c", dict(BASE))]))


def test_what_varies_from_run_to_run_is_taken_out() -> None:
    """Times, directories and made-up names; equal names stay equal, different ones different."""
    tidy = Normaliser(Path("/run/x"))
    value = tidy({"timestamp": 5, "file": "/run/x/f", "a": "#block12", "b": "#block99", "c": "#block12"})
    expected = {"timestamp": "<timestamp>", "file": "<directory>/f", "a": "<auto 0>", "b": "<auto 1>"}
    assert value == expected | {"c": "<auto 0>"}


def test_only_pauses_of_jobs_are_taken_out_of_events() -> None:
    """The first `running` of a job stays; the one after a pause goes with the pause."""
    states = ("created", "running", "paused", "running", "aborting")
    events = [{"event": "JOB_STATUS_CHANGE", "data": {"id": "j", "status": state}} for state in states]
    kept = Normaliser(Path("/run/x")).events(events)
    assert [event["data"]["status"] for event in kept] == ["created", "running", "aborting"]


def test_bytes_are_told_as_runs() -> None:
    """Runs cover the content without gap or overlap."""
    assert nbdview.runs(b"\1\1\0\7") == [[0, 2, 1], [2, 1, 0], [3, 1, 7]]
    assert nbdview.runs(b"") == []


def test_the_readme_lists_exactly_the_allowed_differences() -> None:
    """The table in the README is the one made from the code's list."""
    text = (Path(__file__).parent / "README.md").read_text()
    assert differences.table() in text


@pytest.mark.parametrize("entry", OF_REAL_QEMUS, ids=lambda entry: entry.name)
def test_an_allowed_difference_still_happens(entry: differences.Allowed, short_directory: Path) -> None:
    """An entry that no script needs any more must leave the list."""
    assert any(_happens(entry, name, short_directory) for name in _scripts_of(entry))


def _scripts_of(entry: differences.Allowed) -> list[str]:
    return [name for name in sorted(session.SCRIPTS) if differences.matches(entry.scripts, name)]


def _happens(entry: differences.Allowed, name: str, directory: Path) -> bool:
    played = []
    for subject in entry.pair:
        own = directory / f"{name.replace(':', '-')[:40]}-{subject}"
        own.mkdir()
        subjects.required(subject)
        played.append(session.play(name, subject, own))
    return any(entry.covers(name, entry.pair, each) for each in compare.transcripts(*played))
