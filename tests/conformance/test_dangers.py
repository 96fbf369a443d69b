# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that kill a real QEMU, guest and all. backupctl must never send them; the scripts can't.

Each test holds a fact: should a QEMU survive, the test fails, and the fact's version range has an end.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance import subjects
from tests.conformance.qmp import MonitorClosed
from tests.conformance.session import Session


def enable_an_absent_bitmap(s: Session) -> None:
    s.transaction(("block-dirty-bitmap-enable", {"node": "drive-vda", "name": "absent"}))


def enable_an_absent_bitmap_after_a_good_action(s: Session) -> None:
    absent = {"node": "drive-vda", "name": "absent"}
    s.transaction(
        ("block-dirty-bitmap-disable", {"node": "drive-vda", "name": "b0"}),
        ("block-dirty-bitmap-enable", absent),
    )


def merge_nothing(s: Session) -> None:
    s.do("block-dirty-bitmap-merge", node="drive-vda", target="b0", bitmaps=[])


def give_a_device_the_drive_it_has(s: Session) -> None:
    s.do("qom-set", path="/machine/peripheral/vda", property="drive", value="drive-vda")


DANGERS = [
    enable_an_absent_bitmap,
    enable_an_absent_bitmap_after_a_good_action,
    merge_nothing,
    give_a_device_the_drive_it_has,
]


@pytest.mark.parametrize("version", subjects.REAL)
@pytest.mark.parametrize("danger", DANGERS, ids=lambda danger: danger.__name__)
def test_this_command_kills_qemu(
    danger: Callable[[Session], None], version: str, short_directory: Path
) -> None:
    """QEMU dies of a command that should have been answered."""
    subjects.required(version)
    with subjects.started(version, short_directory) as subject:
        session = Session(subject)
        session.do("block-dirty-bitmap-add", node="drive-vda", name="b0")
        with pytest.raises(MonitorClosed):
            danger(session)
        session.finish()
