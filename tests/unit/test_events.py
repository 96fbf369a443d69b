# SPDX-License-Identifier: GPL-2.0-or-later
"""Events: programs go by their codes and fields."""

from dataclasses import fields, is_dataclass
from typing import get_args

import pytest

from backupctl import events
from backupctl.events import Event, Severity, backup, monitoring, prune, repository, restore, routine
from backupctl.events.backup import BitmapNotPersistent, DiskScanned
from backupctl.names import DiskName, PointId
from backupctl.outcome import documents

CODES = """
attributes-not-kept bitmap-not-persistent configured-rules-not-used crash-consistent damage-detected
damage-unknown definition-incomplete disk-encrypted disk-from-earlier-point disk-missing disk-scanned
disk-skipped disk-taken-full disks-not-restored domain-note file-system-incomplete files-skipped full-due
history-mismatch hook-failed images-read left-for-next-prune metrics-not-written next-run-reads-all
no-backup no-point-to-build-on not-checked nothing-to-verify notice-not-sent other-tool-found overlay-kept
point-damaged point-dropped point-gone point-must-stay recovered-from-earlier-run repository-created
restored-unverified restored-with-damage sample-chosen scratch-may-not-suffice served-to-local-users
start-delayed step-started target-larger target-resized task-skipped vm-ended vm-failed vm-renamed vm-skipped
vm-started waiting-for-lock
""".split()  # noqa: SIM905 - one a line would be a page
"""Scripts rest on these: one may be added, and none may be changed or go."""

MODULES = events, backup, monitoring, prune, repository, restore, routine
KINDS = [
    kind
    for module in MODULES
    for kind in vars(module).values()
    if is_dataclass(kind) and kind.__module__ == module.__name__ and "code" in vars(kind)
]


class Any(dict):
    """Stands for a value of any type in a text."""

    def __rshift__(self, _bits: int) -> int:
        return 0

    def __iter__(self):
        return iter(())


def sample(kind: type[Event]) -> Event:
    return kind(**{one.name: 1.5 if one.type is float else Any() for one in fields(kind)})


def test_the_codes_are_those_that_scripts_know():
    assert sorted(kind.code for kind in KINDS) == CODES


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_every_event_has_one_line_of_text_a_severity_and_a_docstring_of_its_own(kind):
    made = sample(kind)
    assert "\n" not in f"{made.text}"
    assert made.severity in get_args(Severity)
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")  # what `dataclass` writes for want of one
    assert not {one.name for one in fields(kind)} & {"code", "message"}  # keys of its document


def test_damage_makes_a_scan_a_warning():
    scan = {flag: DiskScanned(DiskName("vda"), PointId("P1"), "no bitmap", flag) for flag in (False, True)}
    assert (scan[False].severity, scan[True].severity) == ("note", "warning")


def test_what_every_run_would_repeat_is_a_warning_in_a_full_only():
    told = {full: BitmapNotPersistent(DiskName("vda"), "raw", full) for full in (False, True)}
    assert (told[False].severity, told[True].severity) == ("note", "warning")


def test_a_document_has_code_message_and_fields():
    scanned = DiskScanned(DiskName("vda"), PointId("P1"), "no bitmap", damaged=False)
    assert documents.event(scanned) == {
        "code": "disk-scanned",
        "message": "vda is read in full and compared with P1: no bitmap",
        "disk": "vda",
        "base": "P1",
        "reason": "no bitmap",
        "damaged": False,
    }
