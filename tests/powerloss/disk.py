# SPDX-License-Identifier: GPL-2.0-or-later
"""What a disk may hold after the power failed: every legal outcome of a trace of steps.

As ALICE and CrashMonkey do, for a file system that promises no more than POSIX:

- what was written to a file since its last fsync may be there, or be missing, cut off, zeroes or garbage;
- what was done to a directory's names since its last fsync may have happened or not, each on its own, in any
  combination that has a meaning; an fsync of a file says nothing of its name;
- a rename or link is whole or not at all;
- a file that is appended to keeps what it had; what is new is as above;
- an image that QEMU writes in place has some of its blocks of 4 KiB as before and some as after: QEMU
  flushes between what must not change places, which is taken on trust.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

EMPTY, ZEROES, HALF, GARBAGE, TORN, WHOLE = "empty", "zeroes", "half", "garbage", "torn", "whole"
DOUBTFUL = (EMPTY, ZEROES, HALF, GARBAGE, TORN, WHOLE)
"""What may have become of a new file, or one whose content was to be replaced."""

OLD = "old"
MIXED = (OLD, *(f"mixed{number}" for number in range(20)), WHOLE)
"""And of an image that QEMU writes in place: a block of it is old or new."""

APPENDED = (OLD, *(f"appended {fate}" for fate in (ZEROES, HALF, GARBAGE, TORN)), WHOLE)
"""And of a file that is appended to: what it had is there."""

Content = tuple[str, str]
"""A file's content: the digest of a whole one, and what became of it."""

Tree = dict[str, Content | None]
"""Path to content; None: a directory."""


@dataclass(frozen=True)
class NameStep:
    """A change of names. gone, made: (directory, name) or None. inode: what it names.

    unsynced: the directories that must be synced before it is durable.
    """

    gone: tuple[int, str] | None
    made: tuple[int, str] | None
    inode: int
    unsynced: frozenset[int]

    @classmethod
    def of(cls, gone: tuple[int, str] | None, made: tuple[int, str] | None, inode: int) -> "NameStep":
        return cls(gone, made, inode, frozenset(place[0] for place in (gone, made) if place))


@dataclass
class File:
    """A file. synced: its durable content. coming: what the next fsync will make durable, if it is dirty.

    fates: what may become of it until then.
    """

    synced: str | None = None
    coming: str | None = None
    fates: tuple[str, ...] = DOUBTFUL


@dataclass
class Disk:
    """The state of things while a trace is played."""

    names: dict[tuple[int, str], int] = field(default_factory=dict)
    durable: dict[tuple[int, str], int] = field(default_factory=dict)
    files: dict[int, File] = field(default_factory=dict)
    pending: list[NameStep] = field(default_factory=list)
    inodes: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def place(self, path: str) -> tuple[int, str]:
        """Return directory and name of a path."""
        directory = 0
        *above, name = PurePosixPath(path).parts
        for part in above:
            directory = self.names[directory, part]
        return directory, name

    def inode(self, path: str) -> int:
        return 0 if path == "." else self.names[self.place(path)]

    def load(self, tree: dict[str, str | None]) -> None:
        """Begin with a tree that is all durable: path to digest, None for a directory; parents first."""
        for path, content in tree.items():
            inode = next(self.inodes)
            self.names[self.place(path)] = inode
            if content is not None:
                self.files[inode] = File(synced=content)
        self.durable = dict(self.names)

    def play(self, step: dict[str, Any]) -> None:
        """Do a step."""
        do, path = step["do"], step["path"]
        if do in ("mkdir", "create"):
            inode = next(self.inodes)
            if do == "create":
                self.files[inode] = File(coming=step["coming"])
            self._name(NameStep.of(None, self.place(path), inode))
        elif do in ("rename", "link"):
            source = self.place(path)
            gone = source if do == "rename" else None
            self._name(NameStep.of(gone, self.place(step["to"]), self.names[source]))
        elif do == "remove":
            self._name(NameStep.of(self.place(path), None, self.names[self.place(path)]))
        elif do in ("dirty", "inplace", "append"):
            file = self.files[self.inode(path)]
            file.coming = step["coming"]
            # Of a file that was never synced nothing is sure to be there.
            file.fates = {"inplace": MIXED, "append": APPENDED}.get(do, DOUBTFUL) if file.synced else DOUBTFUL
        elif do == "sync" and "content" in step:
            self.files[self.inode(path)] = File(synced=step["content"])
        elif do == "sync":
            self._sync_directory(self.inode(path))

    def _name(self, step: NameStep) -> None:
        self.pending.append(step)
        apply(self.names, step)

    def _sync_directory(self, directory: int) -> None:
        """All changes of a directory's names are durable now, and of both directories if there are two."""
        left = []
        for step in self.pending:
            waiting = step.unsynced - {directory}
            if waiting:
                left.append(replace(step, unsynced=waiting))
            else:
                apply(self.durable, step)
        self.pending = left

    def tree(self, kept: tuple[NameStep, ...], fates: dict[int, str]) -> Tree:
        """Return what is found after a crash that kept some of the pending steps. fates: of dirty files."""
        names = dict(self.durable)
        for step in kept:
            apply(names, step)
        below: dict[int, list[tuple[str, int]]] = {}
        for (directory, name), inode in names.items():
            below.setdefault(directory, []).append((name, inode))
        found: Tree = {}
        waiting = [("", 0)]
        while waiting:
            path, directory = waiting.pop()
            for name, inode in below.get(directory, []):
                if inode in self.files:
                    found[path + name] = self._content(inode, fates)
                else:
                    found[path + name] = None
                    waiting.append((f"{path}{name}/", inode))
        return found

    def _content(self, inode: int, fates: dict[int, str]) -> Content:
        file = self.files[inode]
        if inode in fates and file.coming is not None:
            both = file.fates is not DOUBTFUL
            return (f"{file.synced}-{file.coming}" if both else file.coming), fates[inode]
        return (file.synced, WHOLE) if file.synced else ("", EMPTY)

    def dirty(self) -> dict[int, tuple[str, ...]]:
        """Name the files whose content is in doubt, and what may become of each."""
        return {inode: file.fates for inode, file in sorted(self.files.items()) if file.coming is not None}


def apply(names: dict[tuple[int, str], int], step: NameStep) -> None:
    """Change names, if what the step needs is there."""
    if step.gone is not None:
        if names.get(step.gone) != step.inode:
            return
        del names[step.gone]
    if step.made is not None:
        names[step.made] = step.inode


def read(trace: Path, end: dict[str, str | None]) -> list[dict[str, Any]]:
    """Read a trace. end: what there was after it.

    coming: added to a step that makes a file dirty, the content that it is given by it.
    """
    steps = [json.loads(line) for line in (trace / "trace").read_text().splitlines()]
    steps = [step for step in steps if not (step["path"] == "." and step["do"] == "mkdir")]
    return [{**step, "coming": _coming(steps, number, end)} for number, step in enumerate(steps)]


def crashes(
    steps: list[dict[str, Any]], start: dict[str, str | None], most: int, seed: int
) -> Iterator[tuple[int, Tree]]:
    """Yield after each step what may be found: how many steps were done, and a tree.

    most: so many for each step; where there are more, the corners and a sample. The same for the same seed.
    """
    disk = Disk()
    disk.load(start)
    chance = random.Random(seed)
    for number, step in enumerate(steps):
        disk.play(step)
        for kept, fates in _choices(disk, most, chance):
            yield number + 1, disk.tree(kept, fates)


def _choices(
    disk: Disk, most: int, chance: random.Random
) -> Iterator[tuple[tuple[NameStep, ...], dict[int, str]]]:
    pending, dirty = disk.pending, disk.dirty()
    count = 2 ** len(pending) * math.prod(map(len, dirty.values()))
    if count <= most:
        for bits in itertools.product((False, True), repeat=len(pending)):
            for fates in itertools.product(*dirty.values()):
                yield tuple(itertools.compress(pending, bits)), dict(zip(dirty, fates, strict=True))
        return
    whole = dict.fromkeys(dirty, WHOLE)
    for one in pending:  # the corners: one change of names lost, and one kept, all files whole and none
        for fates in (whole, {inode: worst[0] for inode, worst in dirty.items()}):
            yield tuple(step for step in pending if step is not one), fates
            yield (one,), fates
    for inode, doubtful in dirty.items():
        for fate in doubtful:
            yield tuple(pending), {**whole, inode: fate}
    for _ in range(most):
        kept = tuple(step for step in pending if chance.random() < 0.7)
        yield kept, {inode: chance.choice(doubtful) for inode, doubtful in dirty.items()}


def _coming(steps: list[dict[str, Any]], number: int, end: dict[str, str | None]) -> str | None:
    """Return the content that the file of a step will have at its next fsync, or at the end."""
    step = steps[number]
    if step["do"] not in ("create", "dirty", "inplace", "append"):
        return None
    path = step["path"]
    for later in steps[number + 1 :]:
        if later["do"] == "rename" and f"{path}/".startswith(f"{later['path']}/"):
            path = later["to"] + path[len(later["path"]) :]
        if later["do"] == "sync" and later["path"] == path and "content" in later:
            return str(later["content"])
    return end.get(path)
