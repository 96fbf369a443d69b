# SPDX-License-Identifier: GPL-2.0-or-later
"""The power fails at any moment of a run: every legal state of the disk keeps what was committed."""

import hashlib
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backupctl.cancel import Cancellation
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.progress import Silent
from fixtures import builds
from tests import interrupted_cli
from tests.powerloss import disk
from tests.powerloss.explore import Judge, Recorded, after_backup, after_prune, explore

RECORDER = "tests.powerloss.recorder:recorded"
MOST = 100
"""States looked at after each step where there are more: enough to catch each bug that is planted below."""
MOSTS = pytest.mark.parametrize("most", [MOST, pytest.param(1500, marks=[pytest.mark.slow])])
MIB = 1 << 20
SIZES = {"vda": 2 << 20, "vdb": (1 << 20) + 512, "vdc": 1 << 20}
Steps = list[dict[str, Any]]


def record(lab, directory: Path, *words: str, **environment: str) -> Recorded:
    """Run the command line with a record of its steps."""
    directory.mkdir()
    repository = lab.cli.repository
    start = tree(repository, directory)
    environment |= {"TRACE": str(directory), "REPOSITORY": str(repository)}
    done = lab.cli.call(words[0], "web", *words[1:], vm=words[0] != "prune", entry=RECORDER, **environment)
    assert done.returncode == 0, done.stderr
    end = tree(repository, directory)
    return Recorded(directory, disk.read(directory, end), start, end)


def tree(root: Path, keep: Path) -> dict[str, str | None]:
    """Return what is in a directory, keeping the content of every file."""
    found: dict[str, str | None] = {}
    for path in sorted(root.rglob("*")):
        content = path.read_bytes() if path.is_file() else None
        digest = None if content is None else hashlib.sha256(content).hexdigest()
        found[str(path.relative_to(root))] = digest
        if content is not None:
            (keep / str(digest)).write_bytes(content)
    return found


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory whose fsyncs cost nothing, if there is one."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="backupctl-test-", dir=where) as name:
        yield Path(name)


@pytest.fixture
def lab(make_lab):
    """A VM of three disks, simulated: of the VM nothing is asked here but that it answers."""
    made = make_lab(builds.simulator("7.2"), SIZES, seed=5)
    made.writer.write(10)
    return made


def look_at_all(run: Recorded, work: Path, most: int) -> int:
    done = explore(run, work, after_backup(run), most=most, deep_every=100)
    assert done.violations == [], done.violations[:5]
    assert done.looked_deep > 0
    return done.states


@MOSTS
@pytest.mark.timeout(600)
def test_every_state_after_a_power_failure_keeps_what_was_committed(
    lab, work, tmp_path, record_property, most
):
    """In the first full, which makes the repository; an incremental; and one that clears up after a death."""
    states = look_at_all(record(lab, tmp_path / "full", "full"), work, most)
    lab.writer.write(5)
    states += look_at_all(record(lab, tmp_path / "more", "incremental"), work, most)
    lab.writer.write(5)
    died = lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, KILL_AT=last_step(lab))
    assert died.returncode == -signal.SIGKILL
    assert list(lab.cli.repository.glob("web/*.partial/manifest.json"))
    after_death = record(lab, tmp_path / "again", "incremental")
    states += look_at_all(after_death, work, most)
    record_property("cases", ("states after a power failure in a run", states))
    assert states >= {MOST: 2000, 1500: 6000}[most]


def last_step(lab) -> str:
    """Return the number of the commit's rename among the steps of an incremental."""
    log = lab.directory / "steps"
    assert lab.cli.call("incremental", "web", entry=interrupted_cli.ENTRY, STEPS=str(log)).returncode == 0
    names = [line.strip() for line in log.read_text().splitlines()]
    return str(len(names) - 1 - names[::-1].index("rename"))


def without(suffix: str, do: str = "sync") -> Callable[[Steps], Steps]:
    """Leave out a kind of step on files of a name."""
    return lambda steps: [
        step for step in steps if step["do"] != do or not str(step["path"]).endswith(suffix)
    ]


def rename_first(steps: Steps) -> Steps:
    """Commit before the last that the commit makes durable."""
    at = last_of(steps, "rename", ".partial")
    directory = steps[at]["path"]
    begin = next(number for number, step in enumerate(steps) if str(step["path"]).endswith("manifest.json"))
    moved = [{**step, "path": step["path"].replace(directory, steps[at]["to"])} for step in steps[begin:at]]
    return [*steps[:begin], steps[at], *moved, *steps[at + 1 :]]


def last_of(steps: Steps, do: str, suffix: str) -> int:
    return max(n for n, step in enumerate(steps) if step["do"] == do and str(step["path"]).endswith(suffix))


def without_last(do: str, suffix: str) -> Callable[[Steps], Steps]:
    def left(steps: Steps) -> Steps:
        dropped = last_of(steps, do, suffix)
        return [step for number, step in enumerate(steps) if number != dropped]

    return left


def commit_not_synced(steps: Steps) -> Steps:
    """Leave out the syncs of the VM's directory after the commit's rename, that of the summary too."""
    at = last_of(steps, "rename", ".partial")
    return [
        step
        for number, step in enumerate(steps)
        if number < at or step["do"] != "sync" or not str(step["path"]).endswith("web")
    ]


def retired_first(steps: Steps) -> Steps:
    """Give the base bitmap up before the commit is durable."""
    at = last_of(steps, "rename", ".partial")
    return [*steps[:at], {"do": "retired", "path": None, "coming": None}, *steps[at:]]


BUGS: dict[str, Callable[[Steps], Steps]] = {
    "an image is not synced": without("vda.qcow2"),
    "a digest map is not synced": without("vdb.digests"),
    "the manifest is not synced": without("manifest.json"),
    "the point's directory is not synced before the rename": without_last("sync", ".partial"),
    "the VM's directory is not synced after the rename": commit_not_synced,
    "the rename comes before the manifest is durable": rename_first,
    "the base bitmap is given up before the commit": retired_first,
    "the repository's own file is not synced": without(".new"),
    "the history is not synced before the rename": without("/history"),
}


def without_the_first_directories_syncs(steps: Steps) -> Steps:
    """Forget the directory that a merged image is renamed out of."""
    move = next(step for step in steps if step["do"] == "rename" and str(step["to"]).endswith(".qcow2"))
    directory = str(move["path"]).rpartition("/")[0]
    return [step for step in steps if step["do"] != "sync" or step["path"] != directory]


PRUNE_BUGS: dict[str, Callable[[Steps], Steps]] = {
    "the merged image is not synced": without(".qcow2"),
    "the merged digest map is not synced": without(".digests.merged"),
    "the directory that the merged image comes from is not synced": without_the_first_directories_syncs,
}


@pytest.fixture
def first_full(lab, tmp_path) -> Recorded:
    return record(lab, tmp_path / "full", "full")


def test_every_bug_that_is_planted_into_the_order_of_steps_is_caught(first_full, work):
    for name, plant in BUGS.items():
        planted = replace(first_full, steps=plant(first_full.steps))
        assert len(planted.steps) != len(first_full.steps) or planted.steps != first_full.steps, name
        assert explore(planted, work, after_backup(first_full), most=MOST, stop_early=True).violations, name


@pytest.mark.parametrize("forgotten", ["sync_file", "sync_directory"])
def test_a_step_that_the_product_forgets_is_caught(lab, work, tmp_path, forgotten):
    run = record(lab, tmp_path / "full", "full", FORGET=forgotten)
    assert explore(run, work, after_backup(run), most=MOST, stop_early=True).violations


HISTORIES = {
    "one size": (2 << 20, 2 << 20, 2 << 20),
    "grown": (2 << 20, 3 << 20, 3 << 20),
    "shrunk": (2 << 20, MIB + 512, MIB + 512),
    "grown over what a smaller one hid": (2 << 20, MIB + 512, 2 << 20),
}
"""The disk's size in bytes at each of three points."""


@pytest.fixture
def pruned(request, lab, tmp_path) -> tuple[Recorded, Judge]:
    """A full and two incrementals, of which one is pruned: the layer on it is merged into it."""
    history = getattr(request, "param", "one size")
    dropped = 1 if history == "grown over what a smaller one hid" else 0
    held, points = {}, []
    for kind, size in zip(("full", "incremental", "incremental"), HISTORIES[history], strict=True):
        lab.machine.qmp("block_resize", **{"node-name": "node-vda", "size": size})
        length = 262_144 if points else size
        lab.machine.io("vda", f"write -P {len(points) + 1} {len(points) * 65_536} {length}")
        points.append(lab.backup(kind, "--disk", "vda")["point"])
        held[points[-1], "vda"] = lab.cli.raw(points[-1], "vda", lab.directory)
    if dropped:
        lab.cli.run("protect", "web", points[0], vm=False)
    rules = Rules(last=2 - dropped)
    run = record(lab, tmp_path / "prune", "prune", "--keep-last", str(rules.last))
    kept = set(run.points(run.end))
    assert len(kept) == 2

    def again(directory):
        prune.prune(directory, rules, Silent(), Cancellation())

    return run, after_prune(held, kept, again)


@MOSTS
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pruned", HISTORIES, indirect=True)
def test_every_state_after_a_power_failure_in_a_prune_keeps_the_points_that_stay(
    pruned, work, record_property, most
):
    run, judge = pruned
    made = [step for step in run.steps if step["do"] in ("inplace", "create")]
    assert any(step["do"] == "inplace" or step["path"].endswith(".qcow2.merged") for step in made)
    done = explore(run, work, judge, most=most, deep_every=40)
    assert done.violations == [], done.violations[:5]
    assert done.looked_deep > 0
    record_property("cases", ("states after a power failure in a prune", done.states))


def test_a_merge_that_forgets_to_sync_is_caught(pruned, work):
    run, judge = pruned
    for name, plant in PRUNE_BUGS.items():
        planted = replace(run, steps=plant(run.steps))
        assert planted.steps != run.steps, name
        assert explore(planted, work, judge, most=MOST, stop_early=True).violations, name


def test_what_is_kept_of_unsynced_steps_is_any_of_them():
    """Two files made, one of them synced, in a directory that is synced after the first."""
    steps = [
        {"do": "create", "path": "a", "coming": "A"},
        {"do": "sync", "path": ".", "coming": None},
        {"do": "create", "path": "b", "coming": "B"},
        {"do": "sync", "path": "b", "content": "B", "coming": None},
    ]
    last = {frozenset(found.items()) for done, found in disk.crashes(steps, {}, 100, 1) if done == 4}
    fates = [("a", ("A", fate)) for fate in disk.DOUBTFUL]
    whole = ("b", ("B", disk.WHOLE))
    assert last == {frozenset({fate}) for fate in fates} | {frozenset({fate, whole}) for fate in fates}


def test_a_rename_between_directories_is_durable_when_both_are_synced():
    start = {"x": None, "y": None, "x/file": "F"}
    steps = [
        {"do": "rename", "path": "x/file", "to": "y/file", "coming": None},
        {"do": "sync", "path": "y", "coming": None},
        {"do": "sync", "path": "x", "coming": None},
    ]
    found: dict[int, set[str]] = {}
    for done, outcome in disk.crashes(steps, start, 100, 1):
        found.setdefault(done, set()).update(path for path in outcome if path.endswith("file"))
    assert found == {1: {"x/file", "y/file"}, 2: {"x/file", "y/file"}, 3: {"y/file"}}
