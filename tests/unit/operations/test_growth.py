# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command does on many points grows in a line with them: counted, since times differ by machine."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import DamageFound
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.operations.prune.survey import Survey
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.restore.whole import restore
from backupctl.operations.verify import run as verify
from backupctl.operations.verify.layer import VerifyScope
from backupctl.progress import Silent
from backupctl.repository import audit, chain, history, markers, merge
from backupctl.repository.history import PointEvent
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory
from fixtures.many_points import VM, make, point_number

_hooked: list[Counter[str]] = []


@contextmanager
def opened() -> Iterator[Counter[str]]:
    """Count the files that are opened until the block ends, by their names without the directory."""
    if not _hooked:
        sys.addaudithook(_count)  # for ever: Python knows no removal
    _hooked.append(Counter())
    try:
        yield _hooked[-1]
    finally:
        _hooked[-1] = Counter()


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | Path):
        _hooked[-1][Path(arguments[0]).name] += 1
    elif event == "subprocess.Popen":
        _hooked[-1]["a process"] += 1


def drop(vm: VmDirectory, number: int) -> prune.PruneReport:
    """Drop the oldest points."""
    rules = Rules(last=len(vm.scan_points().points) - number)
    return prune.prune(vm, rules, Silent(), Cancellation(), max_chain=5)


def check(vm: VmDirectory) -> int:
    repository = Repository.open(vm.path.parent)
    report = verify.verify(repository, VM, None, VerifyScope(), Silent(), Cancellation())
    assert report.damage == ()
    return report.layers


def test_what_a_prune_opens_for_a_point_that_goes_does_not_depend_on_the_others(tmp_path):
    """For each of those that stay: its manifest a few times, however many go."""
    found = []
    for chains in ([10, 10], [20, 10], [10] * 9):
        vm = make(tmp_path / str(len(found)), chains)
        with opened() as files:
            report = drop(vm, chains[0])
        assert len(report.removed) == chains[0]
        assert report.long_chains[0].endswith(": 6 layers")
        found.append((sum(chains), files["manifest.json"]))
        assert check(vm) == sum(chains[1:])
    assert all(manifests <= 7 * points for points, manifests in found), found


def test_the_end_of_a_history_is_found_however_long_it_is(tmp_path, monkeypatch):
    vm = make(tmp_path / "repository", [2])
    monkeypatch.setattr(history, "_TAIL_BYTES", 64)  # less than a line
    known = history.read(vm.path)
    end = history.end(vm.path)
    assert known is not None
    assert end == len(known.content)
    history.record(vm.path, PointEvent("dropped", point_number(1)), PointEvent("found", point_number(7)))
    assert history.points_since(vm.path, end) == {point_number(1), point_number(7)}
    assert history.points_since(vm.path, history.end(vm.path)) == set()
    found = history.read(vm.path)
    assert found is not None
    assert found.flaws == ()
    (vm.path / "history").write_bytes(known.content[: end // 2])
    assert history.points_since(vm.path, end) is None


def test_a_survey_sees_all_that_others_change(tmp_path):
    vm = make(tmp_path / "repository", [3, 3])
    survey = Survey(vm)
    survey.update()
    assert [point.id for point in survey.current()] == [point_number(number) for number in range(6)]
    assert [point.id for point in survey.above(point_number(3), "vda")] == [point_number(4)]
    # another prune retires one, and removes it
    last = vm.path / point_number(5)
    markers.put(last, markers.RETIRED)
    history.record(vm.path, PointEvent("dropped", point_number(5)))
    survey.update()
    assert [point.id for point in survey.retired()] == [point_number(5)]
    assert survey.is_needed(survey.current()[3])
    PendingPoint(vm.path, vm.name, point_number(5)).uncommit()
    survey.update()
    assert survey.retired() == []
    assert survey.above(point_number(4), "vda") == []
    # a manifest is replaced
    with opened() as files:
        second = vm.point(point_number(1))
        merge.rewrite(second, replace(second.manifest, kind="full", parent=None))
        survey.update()
    assert files["manifest.json"] == 2  # the look and the survey's
    assert survey.built_on(point_number(0)) == []
    # a point comes back without a line in the history, and another one is damaged
    (vm.path / f"{point_number(5)}.partial").rename(last)
    survey.update()
    assert [point.id for point in survey.retired()] == [point_number(5)]
    (vm.path / point_number(2) / "manifest.json").write_text("{}")
    history.record(vm.path, PointEvent("changing", point_number(2)))
    with pytest.raises(DamageFound, match="nothing is pruned"):
        survey.update()


@pytest.mark.parametrize(
    "look",
    [VmDirectory.scan_points, audit.problems, audit.reconcile, chain.damaged, check],
    ids=lambda one: one.__name__,
)
def test_a_look_at_all_opens_each_file_a_few_times(tmp_path, look: Callable[[VmDirectory], object]):
    counted = []
    for points in (10, 30):
        vm = make(tmp_path / str(points), [points])
        with opened() as files:
            look(vm)
        assert files["a process"] == 0
        counted.append(sum(files.values()))
    assert counted[1] <= 3 * counted[0] + 5, counted


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_restore_of_a_long_chain_starts_no_process_and_opens_each_layer_a_few_times(tmp_path, image_format):
    vm = make(tmp_path / "repository", [60])
    last = point_number(59)
    request = RestoreRequest(
        directory=vm, point=last, to=str(tmp_path / f"out.{image_format}"), image_format=image_format
    )
    with opened() as files:
        restore(request, Silent(), Cancellation())
    assert files["a process"] == 0
    assert files["vda.qcow2"] <= 4 * 60


def test_a_thousand_tiny_points_are_verified_and_a_chain_of_them_is_dropped_in_seconds(tmp_path):
    """Loosely: 2 and 1 CPU seconds on a machine of 2024; 27 and 12 when each layer had a server."""
    vm = make(tmp_path / "repository", [100] * 10)
    began = time.process_time()
    assert check(vm) == 1000
    assert len(drop(vm, 100).removed) == 100
    assert time.process_time() - began < 12
