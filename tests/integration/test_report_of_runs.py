# SPDX-License-Identifier: GPL-2.0-or-later
"""A report on points that real runs have made, and on a run while it works."""

import json
import re
import time
from datetime import UTC, datetime, timedelta

import pytest

from backupctl.cancel import Cancellation
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.names import VmName
from backupctl.operations.check import Limits
from backupctl.operations.report import gather
from backupctl.operations.report.gather import VmRequest
from backupctl.repository.repository import Repository
from tests.conftest import MIB

pytestmark = pytest.mark.simulator_too
SLOW = ("--limit", "2M")


@pytest.fixture
def lab(any_build, make_lab):
    return make_lab(any_build, {"vda": 4 * MIB})


def facts(lab):
    repository = Repository.open(lab.cli.repository)
    asked = VmRequest(repository.vm(VmName("web")), Limits(timedelta(hours=1)))
    return gather.repository(repository.path, [asked], datetime.now(UTC), Cancellation()).vms[0]


def changed(before: bytes, after: bytes) -> list[bool]:
    """Return for each cluster whether it differs."""
    return [
        before[at : at + CLUSTER_BYTES] != after[at : at + CLUSTER_BYTES]
        for at in range(0, len(after), CLUSTER_BYTES)
    ]


def test_the_map_of_an_incremental_is_what_the_guest_has_changed(lab, tmp_path):
    held = []
    for kind in ("full", "incremental", "incremental"):
        lab.writer.write(6)
        held.append((lab.backup(kind)["point"], lab.writer.moment["vda"]))
    found = facts(lab)
    assert [one.id for one in found.points] == [point for point, _ in held]
    rows = [[bool(share) for share in row.shares] for row in found.maps[0].rows]
    assert rows[1:] == [changed(held[number][1], held[number + 1][1]) for number in range(2)]
    assert any(rows[1])
    shown = lab.cli.json("show", "web", "latest", vm=False)
    assert found.points[-1].stored_bytes == sum(one["stored_bytes"] for one in shown["disks"])
    assert found.points[-1].frozen_ms == shown["frozen_ms"]
    lab.cli.run("report", "web", "--html", str(tmp_path / "r.html"), vm=False)
    listed = re.findall(r"<th scope=row>(\d{8}T\d{6}Z)<td>\d{4}-", (tmp_path / "r.html").read_text())
    assert listed == [point for point, _ in reversed(held)]


def test_a_run_is_reported_while_it_works_and_is_not_disturbed(lab):
    lab.writer.write(20)
    lab.backup("full")
    lab.writer.write(40)
    with lab.cli.start("incremental", "web", "--json", *SLOW) as run:
        seen = []
        deadline = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < deadline:
            if (doing := facts(lab).run) is not None and doing.kind != "other":
                seen.append(doing)
        report = json.loads(run.stdout.read())
    assert run.returncode == 0
    assert {one.kind for one in seen} == {"incremental"}
    assert {one.point for one in seen} <= {report["point"], None}
    written = [one.done_bytes for one in seen]
    assert written == sorted(written)
    assert written[-1] > 0
    assert 7 in {one.step for one in seen}
    assert facts(lab).run is None
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()
