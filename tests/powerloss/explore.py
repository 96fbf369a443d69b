# SPDX-License-Identifier: GPL-2.0-or-later
"""Play a trace against every state that a power failure may leave, and look at each with the product's eyes.

After a backup: the repository opens; every point that was committed before the run is there, byte for byte;
the new one is whole or not there, and is there once the VM's bitmaps rest on it; what the next run does
first leaves nothing unfinished, takes no point away, and can begin a point of its own. After a prune: every
point that stays holds the same bytes and agrees with its digests, and so does one that goes, if it is there.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from backupctl.cancel import Cancellation
from backupctl.digests import clusters
from backupctl.errors import BackupctlError
from backupctl.names import PointId, VmName, next_point_id, point_time
from backupctl.operations import recover
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import verify
from backupctl.progress import Silent
from backupctl.repository import audit, chain, history
from backupctl.repository.journal import Journal
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory
from fixtures.pieces import of_piece
from tests.powerloss import disk, qcow2
from tests.powerloss.disk import EMPTY, GARBAGE, HALF, MIXED, OLD, TORN, WHOLE, ZEROES, Content, Tree

VM = VmName("web")
_BLOCK_BYTES = 4096
Points = dict[str, dict[str, Content]]
"""Point to its files."""


@dataclass
class Recorded:
    """A run that was recorded. start: what was durable before it; end: what there was after it."""

    trace: Path
    steps: list[dict[str, Any]]
    start: dict[str, str | None]
    end: dict[str, str | None]

    def points(self, tree: dict[str, str | None]) -> Points:
        """Return the committed points of a tree with their files."""
        found: Points = {}
        for path, content in tree.items():
            parts = path.split("/", 2)
            if len(parts) == 3 and content is not None and not parts[1].endswith(".partial"):
                found.setdefault(parts[1], {})[parts[2]] = (content, WHOLE)
        return found


@dataclass
class Explored:
    """What came of it. states: different ones. violations: what was wrong, in which."""

    states: int = 0
    looked_deep: int = 0
    violations: list[str] = field(default_factory=list)


Judge = Callable[[Path, bool, bool], str]
"""Says what is wrong with a state, "" if nothing is. It is told whether the new point must be there, and
whether to look deeper than usual."""


def explore(
    run: Recorded, work: Path, judge: Judge, *, most: int, deep_every: int = 0, stop_early: bool = False
) -> Explored:
    """Look at all states. most: for each step. deep_every: at which of them deeper."""
    result = Explored()
    seen = set()
    pool = Pool(run.trace, work / "pool")
    relied_on = _relied_on(run.steps)
    for done, tree in disk.crashes(run.steps, run.start, most, seed=1):
        due = done > relied_on
        key = due, frozenset(tree.items())
        if key in seen:
            continue
        seen.add(key)
        result.states += 1
        state = work / "state"
        pool.lay_out(tree, state)
        deep = bool(deep_every) and result.states % deep_every == 0
        result.looked_deep += deep
        try:
            wrong = judge(state, due, deep)
        except BackupctlError as err:
            wrong = f"{type(err).__name__}: {err.message}"
        finally:
            shutil.rmtree(state)
        if wrong:
            result.violations.append(f"after step {done - 1} ({run.steps[done - 1]}): {wrong}")
            if stop_early:
                break
    return result


def _relied_on(steps: list[dict[str, Any]]) -> int:
    """Return the step by which the VM's bitmaps, or the user, rest on the new point.

    The last time that bitmaps are given up: before it recovery may have removed some of a dead run's.
    """
    retired = [number for number, step in enumerate(steps) if step["do"] == "retired"]
    return retired[-1] if retired else next(n for n, step in enumerate(steps) if step["do"] == "reported")


def after_backup(run: Recorded) -> Judge:
    """Return the judge of a full's or an incremental's states."""
    before, after = run.points(run.start), run.points(run.end)
    (new,) = set(after) - set(before)

    def judge(state: Path, due: bool, deep: bool) -> str:
        if before and not (state / "repository.json").exists():
            return "repository.json is gone"
        repository = Repository.open_or_create(state)
        directory = repository.vm(VM)
        must = new if due else None
        wrong = _points(directory, before, after, must) or (_verified(repository) if deep else "")
        wrong = wrong or _alarm(directory) or _missed(directory) or _next_run(repository, directory)
        return wrong or _points(directory, before, after, must) or _alarm(directory) or _missed(directory)

    return judge


Contents = dict[tuple[str, str], bytes]
"""Point and disk to its bytes."""


def after_prune(held: Contents, kept: set[str], again: Callable[[VmDirectory], object]) -> Judge:
    """Return the judge of a prune's states. again: prunes once more, by the same rules."""

    def judge(state: Path, _due: bool, deep: bool) -> str:
        repository = Repository.open(state)
        directory = repository.vm(VM)
        wrong = _contents(directory, held, kept) or (_verified(repository) if deep else "")
        wrong = (
            wrong or _alarm(directory) or _next_run(repository, directory) or _contents(directory, held, kept)
        )
        wrong = wrong or _alarm(directory) or _missed(directory)
        if deep and not wrong:
            again(directory)
            there = {point.id for point in directory.points()}
            wrong = "" if there == kept else f"after another prune there are {sorted(there)}"
            wrong = wrong or _contents(directory, held, kept) or _verified(repository)
        return wrong

    return judge


def _alarm(directory: VmDirectory) -> str:
    """No power failure is told as a point that is missing or was exchanged, nor as a changed history."""
    found = audit.problems(directory)
    return f"false alarm: {found[0].message}" if found else ""


def _missed(directory: VmDirectory) -> str:
    """The history knows every point with its manifest: none could go unmissed."""
    known = history.read(directory.path)
    for point in directory.points():
        one = known.points.get(point.id) if known else None
        if one is None or not one.there or point.manifest.checksum not in one.manifests:
            return f"the history does not hold {point.id}"
    return ""


def _verified(repository: Repository) -> str:
    found = verify(repository, None, None, VerifyScope(), Silent(), Cancellation()).damage
    return f"verify: {found[0].message}" if found else ""


def _contents(directory: VmDirectory, held: Contents, kept: set[str]) -> str:
    """Compare every point that there is, cluster by cluster with its digests too."""
    survey = directory.scan_points()
    if survey.damaged:
        return f"damaged: {survey.damaged[0][1].message}"
    if not kept <= {point.id for point in survey.points}:
        return f"a point that stays is gone; there are {[point.id for point in survey.points]}"
    for point in survey.points:
        for entry in point.manifest.disks:
            layers = chain.layers(directory, point, entry.name)
            content = qcow2.content([layer.path for layer in layers])
            if content != held[point.id, entry.name]:
                return f"{entry.name} of {point.id} is not what it was"
            found = _digests(content)
            should = chain.effective_content(layers, entry.size).window(0, len(found))
            if clusters.differ(found, should).any():
                return f"{entry.name} of {point.id} would be refused by a restore"
    return ""


@lru_cache(maxsize=32)
def _digests(content: bytes) -> Any:
    return of_piece(0, memoryview(content))


def _points(directory: VmDirectory, before: Points, after: Points, due: str | None) -> str:
    survey = directory.scan_points()
    if survey.damaged:
        return f"damaged: {survey.damaged[0][1].message}"
    there = {point.id for point in survey.points}
    if not set(before) <= there or (due and due not in there):
        return f"a committed point is gone; there are {sorted(there)}"
    for point in survey.points:
        names = {str(path.relative_to(point.path)) for path in point.path.rglob("*") if not path.is_dir()}
        if names != set(after[point.id]):
            return f"{point.id} holds {sorted(names)}"
        for name, (content, fate) in after[point.id].items():
            if not os.path.samefile(point.path / name, Pool.path_of(directory.path.parent, (content, fate))):
                return f"{point.id}/{name} is not whole"
    return ""


def _next_run(repository: Repository, directory: VmDirectory) -> str:
    """Do what the next run does first, and begin a point."""
    facts = recover.DirectoryFacts(directory, repository.owner)
    with directory.lock():
        facts.unfinished()
        recover.drop_leftover_files(facts)
        audit.reconcile(directory)
        if directory.pending_points():
            return "something unfinished is left"
        newest = directory.newest()
        point = next_point_id(point_time(newest or PointId("20260101T000000Z")), newest)
        journal = Journal(point, VM, repository.id, "full", "attach", "2026", 1, (), False)
        directory.begin(point, journal).drop()
    return ""


class Pool:
    """Every content that a file may have, once; states are made of links to them."""

    def __init__(self, trace: Path, directory: Path) -> None:
        self._trace = trace
        self._directory = directory
        directory.mkdir(exist_ok=True)

    @staticmethod
    def path_of(state: Path, content: Content) -> Path:
        return state.parent / "pool" / ".".join(content)

    def lay_out(self, tree: Tree, state: Path) -> None:
        """Make a directory that looks like a tree."""
        state.mkdir()
        for path in sorted(tree):
            content = tree[path]
            if content is None:
                (state / path).mkdir()
            elif path.endswith("/lock"):
                (state / path).touch()  # the one file that is written to
            else:
                os.link(self._made(content), state / path)

    def _made(self, content: Content) -> Path:
        path = self._directory / ".".join(content)
        if not path.exists():
            path.write_bytes(self._bytes(*content))
        return path

    def _bytes(self, digest: str, fate: str) -> bytes:
        if "-" in digest and fate.startswith("appended "):
            before, after = ((self._trace / part).read_bytes() for part in digest.split("-"))
            return before + self._become(after[len(before) :], fate.removeprefix("appended "))
        if fate in MIXED and "-" in digest:
            return self._mixed(*digest.split("-"), fate)
        whole = (self._trace / digest).read_bytes() if digest else b""
        return self._become(whole, fate)

    @staticmethod
    def _become(whole: bytes, fate: str) -> bytes:
        half = len(whole) // 2
        garbage = random.Random(len(whole)).randbytes(len(whole))
        return {
            WHOLE: whole,
            EMPTY: b"",
            ZEROES: bytes(len(whole)),
            HALF: whole[:half],
            GARBAGE: garbage,
            TORN: whole[:half] + garbage[half:],
        }[fate]

    def _mixed(self, before: str, after: str, fate: str) -> bytes:
        """Return some blocks as they were, some as they will be; behind an end there are zeroes."""
        old, new = (self._trace / before).read_bytes(), (self._trace / after).read_bytes()
        if fate in (OLD, WHOLE):
            return old if fate == OLD else new
        chance = random.Random(fate)
        length = max(len(old), len(new))
        old, new = old.ljust(length, b"\0"), new.ljust(length, b"\0")
        blocks = range(0, length, _BLOCK_BYTES)
        return b"".join(chance.choice((old, new))[at : at + _BLOCK_BYTES] for at in blocks)
