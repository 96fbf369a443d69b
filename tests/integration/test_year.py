# SPDX-License-Identifier: GPL-2.0-or-later
"""A year's life in minutes: hourly and daily points of a machine that is written to, pruned after each."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.names import vm_name
from backupctl.operations.backup import run as backup
from backupctl.operations.backup.context import RunContext
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.operations.verify import run as verify
from backupctl.options import FreezeOptions, QmpAccess, RunOptions, ScratchOptions, VmConfig
from backupctl.progress import Silent
from backupctl.repository import chain
from backupctl.repository.chain import Layer
from backupctl.repository.repository import Repository
from backupctl.system.address import Address
from fixtures import builds
from tests.conftest import MIB

BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def moments(days: int, hours: int) -> list[datetime]:
    """Return so many daily moments, then so many hourly ones."""
    daily = [BEGIN + timedelta(days=day) for day in range(days)]
    return daily + [daily[-1] + timedelta(hours=hour) for hour in range(1, hours + 1)]


def live(lab, when: list[datetime], rules: Rules) -> dict[str, float]:
    """Take a point at each moment and prune; each that is left is byte-equal. Returns figures."""
    vm = VmConfig(vm_name("web"), QmpAccess(Address.parse(str(lab.machine.qmp_path))))
    repository = Repository.open_or_create(lab.cli.repository)
    directory = repository.vm(vm.name)
    options = RunOptions(
        "incremental", freeze=FreezeOptions("never"), scratch=ScratchOptions(lab.cli.scratch)
    )
    held: dict[str, dict[str, bytes]] = {}
    changed = merged = written = 0
    lab.writer.write(30)
    for moment in when:
        lab.writer.write(3)
        taken = backup.run(
            RunContext(vm, repository, options, Silent(), Cancellation(), lambda moment=moment: moment)
        )
        changed += sum(disk.stored_bytes for disk in taken.disks)
        held[taken.point] = dict(lab.writer.moment)
        pruned = prune.prune(directory, rules, Silent(), Cancellation())
        assert pruned.left == ()
        kept = {one.point for one in pruned.decisions if one.keep}
        assert kept == {point.id for point in directory.points()}
        held = {point: content for point, content in held.items() if point in kept}
        merged += len(pruned.merged)
        written += sum(one.written_bytes for one in pruned.merged)
    for point, content in held.items():
        lab.assert_point(point, content)
    lab.assert_at_rest()
    report = verify.verify(repository, vm.name, None, verify.VerifyScope(), Silent(), Cancellation())
    assert report.damage == ()
    points = directory.points()
    return {
        "taken": len(when),
        "left": len(points),
        "longest chain": max(
            chain.length(directory, points[-1], entry, {}) for entry in points[-1].manifest.disks
        ),
        "merges": merged,
        "MiB written by merges": written / MIB,
        "MiB stored by all runs": changed / MIB,
        "MiB in the repository": sum(
            path.stat().st_blocks * 512 for path in directory.path.rglob("*") if path.is_file()
        )
        / MIB,
        "MiB the layers left name": sum(
            CLUSTER_BYTES * int(np.count_nonzero(~clusters.is_zero(layer.digests().records)))
            for point in points
            for layer in (Layer.of(point, entry) for entry in point.manifest.disks)
        )
        / MIB,
        "images left": sum(len(point.manifest.disks) for point in points),
        "leaks": len([note for note in report.notes if "leaked clusters" in note]),
    }


def told(figures: dict[str, float]) -> None:
    print("\n".join(f"{name:>24} {value:.4g}" for name, value in figures.items()))


def assert_no_waste(figures: dict[str, float]) -> None:
    """What lies there is what the points that are left need, and half a mebibyte of tables for each image."""
    needed = figures["MiB the layers left name"] + figures["images left"] / 2
    assert figures["MiB in the repository"] < needed
    assert figures["MiB in the repository"] < figures["MiB stored by all runs"]
    assert figures["leaks"] == 0


def test_a_month_of_points_is_pruned_to_what_the_rules_hold(make_lab):
    lab = make_lab(builds.simulator("7.2"), {"vda": 8 * MIB, "vdb": 2 * MIB + 512}, seed=5)
    figures = live(lab, moments(16, 8), Rules(hourly=4, daily=4, weekly=2))
    told(figures)
    assert figures["left"] == figures["longest chain"] == 8
    assert_no_waste(figures)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_year_of_points_is_pruned_to_what_the_rules_hold(make_lab):
    lab = make_lab(builds.simulator("7.2"), {"vda": 32 * MIB + 512}, seed=6)
    rules = Rules(hourly=24, daily=7, weekly=5, monthly=12)
    figures = live(lab, moments(340, 60), rules)
    told(figures)
    assert figures["taken"] == 400
    assert figures["left"] == figures["longest chain"]
    assert figures["left"] <= 24 + 7 + 5 + 12
    assert_no_waste(figures)
