# SPDX-License-Identifier: GPL-2.0-or-later
"""Dropping points that no rule holds any more, without losing a byte of those that stay.

::

    1 decide   which points go                                        (retention)
    2 retire   each of them is marked: from here on it is no recovery point
    3 clear    nothing is based on a retired point: its directory is removed
               one layer is based on it: that one is merged into it   (merge, copy_layer)
               several are (differentials): it waits until one is left

Step 3 depends only on what is in the repository, so after a crash at any point the next prune continues
where this one ended. The VM's lock is taken for each step of it, so that a backup need not wait for all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.errors import BackupctlError, DamageFound, Failed, Locked, NoSuchPoint, WriteFailed
from backupctl.events import StepStarted
from backupctl.events.prune import LeftForNextPrune, PointDropped
from backupctl.names import DiskName, PointId
from backupctl.operations import usage
from backupctl.operations.prune import copy_layer, retention
from backupctl.operations.prune.retention import Decision, RetentionCandidate, Rules
from backupctl.operations.prune.survey import Survey
from backupctl.progress import Reporter
from backupctl.repository import audit, chain, history, markers, merge, summary
from backupctl.repository.chain import Layer
from backupctl.repository.history import PointEvent
from backupctl.repository.manifest import DiskEntry
from backupctl.repository.merge import Merge
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.point import Point
from backupctl.repository.vm_directory import VmDirectory
from backupctl.system import locks
from backupctl.vm.filling import Filling

STATE = "every remaining point is complete; a point that was dropped stays dropped"
_LOCK_SECONDS = 1.0


@dataclass(frozen=True)
class MergedLayer:
    """A layer that was merged with the one below. point: whose layer it is. written_bytes: by the merge."""

    point: PointId
    disk: DiskName
    below: PointId
    written_bytes: int


@dataclass(frozen=True)
class PruneReport:
    """The result of a prune.

    decisions: for each point that there was. dropped: points that are no longer recovery points. removed:
    those whose directories are removed too. left: what the next prune has to do, and why. long_chains: disks
    of kept points with more layers than was asked for. damage: why layers could not be merged. freed:
    bytes by point, as the file system counts them; of a plan an estimate, or None if it cannot be made.
    """

    decisions: tuple[Decision, ...]
    dropped: tuple[PointId, ...] = ()
    removed: tuple[PointId, ...] = ()
    merged: tuple[MergedLayer, ...] = ()
    left: tuple[str, ...] = ()
    long_chains: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()
    freed: Mapping[PointId, int] | None = None

    @property
    def freed_bytes(self) -> int | None:
        """All that is freed; None if it is not known. Below 0 where a merge is left unfinished."""
        return None if self.freed is None else sum(self.freed.values())


def plan(
    directory: VmDirectory, rules: Rules, coming: Sequence[RetentionCandidate] = ()
) -> tuple[Decision, ...]:
    """Decide for each point of a VM. coming: points that are still to be made.

    Raises UsageError, NoSuchPoint, DamageFound, RepositoryError.
    """
    directory.refuse_unknown()  # taking its lock would make it
    return _decide(Survey(directory), rules, coming)


def _decide(survey: Survey, rules: Rules, coming: Sequence[RetentionCandidate] = ()) -> tuple[Decision, ...]:
    survey.update()
    held = [
        RetentionCandidate(
            point.id,
            point.manifest.started,
            tuple(entry.name for entry in point.manifest.disks),
            point.protected,
        )
        for point in survey.current()
    ]
    return retention.decide([*held, *coming], rules, datetime.now(UTC))


def prune(
    directory: VmDirectory, rules: Rules, reporter: Reporter, stop: Cancellation, max_chain: int | None = None
) -> PruneReport:
    """Drop the points that no rule holds, and finish what an earlier prune began.

    What cannot be done now (a point is being read, a layer to be merged is damaged) is left for the next
    prune, and reported. Raises UsageError, NoSuchPoint, Locked, DamageFound if a manifest is damaged: then it
    is not known what is based on what. Further Interrupted, WriteFailed, ReadFailed, RepositoryError.
    """
    directory.refuse_unknown()  # taking its lock would make it
    steps = _Steps.of(directory, reporter, stop)
    try:
        with directory.lock():
            audit.reconcile(directory)
            decisions = _decide(steps.survey, rules)
            steps.retire_all(retention.dropped(decisions))
        steps.clear()
    except Failed as err:
        raise err.add(
            state=STATE,
            hint="run the same prune again: it continues where this one stopped",
            next_command=f"backupctl prune {directory.name}",
        ) from err
    finally:
        summary.renew_if_free(directory)
    return replace(steps.outcome.report(decisions), long_chains=long_chains(directory, max_chain))


def drop(
    directory: VmDirectory,
    choose: Callable[[Survey], Sequence[PointId]],
    reporter: Reporter,
    stop: Cancellation,
    *,
    protected: bool,
) -> PruneReport:
    """Drop the points that `choose` returns, and finish what an earlier prune began.

    choose: called under the VM's lock, when the history is in order; may raise. protected: drop those that
    are protected, too. Raises as `prune`.
    """
    directory.refuse_unknown()
    steps = _Steps.of(directory, reporter, stop, protected=protected)
    try:
        with directory.lock():
            audit.reconcile(directory)
            steps.survey.update()
            chosen = choose(steps.survey)
            steps.retire_all(chosen)
        steps.clear()
    finally:
        summary.renew_if_free(directory)
    decisions = [Decision(point, keep=False, reasons=("named",)) for point in chosen]
    return steps.outcome.report(tuple(decisions))


def protect(directory: VmDirectory, wanted: str) -> PointId:
    """Keep prune from dropping a point, until `unprotect`. Raises NoSuchPoint, Locked, RepositoryError."""
    point = directory.point(wanted)
    try:
        # To retire a point prune needs this lock exclusively. Without it prune could retire the point between
        # the look at it and the marker, and a point that the user believes protected would go.
        with locks.directory(point.path, _LOCK_SECONDS, shared=True), _unsealed(directory):
            markers.put(directory.point(point.id).path, markers.PROTECTED)
    except FileNotFoundError as err:
        raise NoSuchPoint(f"a prune has just removed {point.id} of {directory.name}") from err
    summary.renew_if_free(directory)
    return point.id


def unprotect(directory: VmDirectory, wanted: str) -> PointId:
    """Remove a point's protection. Raises NoSuchPoint, RepositoryError."""
    point = directory.point(wanted)
    with _unsealed(directory):
        markers.remove(point.path, markers.PROTECTED)
    summary.renew_if_free(directory)
    return point.id


@contextmanager
def _unsealed(directory: VmDirectory) -> Iterator[None]:
    """Change a marker without the VM's lock, which a run may hold for hours. Raises RepositoryError."""
    # Before: a crash after the change must leave no seal. After: a run may have made one meanwhile.
    directory.break_seal()
    try:
        yield
    finally:
        directory.break_seal()


def long_chains(directory: VmDirectory, most: int | None) -> tuple[str, ...]:
    """Name the disks of points whose chains have more than `most` layers."""
    if most is None:
        return ()
    found = []
    known: chain.Lengths = {}
    for point in directory.points():
        for entry in point.manifest.disks:
            length = chain.length(directory, point, entry, known)
            if length > most:
                found.append(f"{entry.name} of {point.id}: {length} layers")
    return tuple(found)


@dataclass
class _Outcome:
    """What the steps of a prune have done so far, and what they left; see `PruneReport`.

    skipped: merges that cannot be done now, by the upper point and disk. in_use: points whose directories
    cannot be removed now.
    """

    dropped: list[PointId] = field(default_factory=list)
    removed: list[PointId] = field(default_factory=list)
    merged: list[MergedLayer] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    skipped: set[tuple[PointId, str]] = field(default_factory=set)
    in_use: set[PointId] = field(default_factory=set)
    freed: dict[PointId, int] = field(default_factory=dict)

    def report(self, decisions: tuple[Decision, ...]) -> PruneReport:
        """Return the report of what was done by these decisions."""
        return PruneReport(
            decisions,
            tuple(self.dropped),
            tuple(self.removed),
            tuple(self.merged),
            tuple(self.left),
            damage=tuple(self.damage),
            freed=dict(self.freed),
        )

    @contextmanager
    def freeing(self, point: PointId, *changed: Path) -> Iterator[None]:
        """Count what the block frees in some directories as freed by dropping a point."""
        before = sum(map(usage.tree_bytes, changed))
        yield
        freed = before - sum(map(usage.tree_bytes, changed))
        self.freed[point] = self.freed.get(point, 0) + freed


@dataclass(frozen=True)
class _Steps:
    """Steps 2 and 3."""

    directory: VmDirectory
    reporter: Reporter
    stop: Cancellation
    filling: Filling
    survey: Survey
    outcome: _Outcome
    protected: bool

    @classmethod
    def of(
        cls, directory: VmDirectory, reporter: Reporter, stop: Cancellation, *, protected: bool = False
    ) -> "_Steps":
        """Return the steps for a VM. protected: whether protected points are dropped, too."""
        survey, filling = Survey(directory), Filling(directory.path)
        return cls(directory, reporter, stop, filling, survey, _Outcome(), protected)

    def retire_all(self, points: Iterable[PointId]) -> None:
        """Do step 2 for several points, and remove what a prune was removing when it crashed."""
        self.remove_leftovers()
        for point in points:
            self.retire(point)

    def retire(self, point: PointId) -> None:
        """Do step 2, unless somebody reads the point or has just protected it."""
        path = self.directory.path / point
        try:
            with locks.directory(path, _LOCK_SECONDS):
                if markers.has(path, markers.PROTECTED) and not self.protected:
                    return
                markers.put(path, markers.RETIRED)
                history.record(self.directory.path, PointEvent("dropped", point))
        except Locked:
            self._leave(
                f"{point} is in use, by itself or as the base of a point that is: it is not dropped now"
            )
            return
        self.outcome.dropped.append(point)
        self.reporter.event(PointDropped(point))

    def remove_leftovers(self) -> None:
        """Remove directories that a killed prune was removing; those of backups are for `recover`."""
        for leftover in self.directory.pending_points():
            if markers.has(leftover.path, markers.RETIRED):
                with self.outcome.freeing(leftover.point, leftover.path):
                    leftover.drop()

    def clear(self) -> None:
        """Do step 3, one layer after the other, until nothing is left that can be done now."""
        while True:
            self.stop.check()
            try:
                with self.directory.lock():
                    step = self._next()
                    if step is None:
                        return
                    step()
            except Locked as err:
                self._leave(f"{err.message}; the next prune continues")
                return

    def _next(self) -> Callable[[], None] | None:
        """Return what to do next, None if nothing is left that can be done now."""
        self.survey.update()
        # The oldest first: in any other order a layer would be written once for each merge.
        for point, entry in self.survey.swaps():
            if (point.id, entry.name) not in self.outcome.skipped:
                return partial(self._switch, point, entry)
        retired = self.survey.retired()
        for point in retired:
            if not self.survey.is_needed(point) and point.id not in self.outcome.in_use:
                return partial(self._remove, point)
        for point in retired:
            for entry in point.manifest.disks:
                upper = self.survey.above(point.id, entry.name)
                if len(upper) != 1 or (upper[0].id, entry.name) in self.outcome.skipped:
                    continue
                above = self.survey.above(upper[0].id, entry.name)
                if not merge.unfinished(point, upper[0], above, entry.name):
                    return partial(self._merge, point, upper[0], entry.name)
        return None

    def _remove(self, point: Point) -> None:
        try:
            with locks.directory(point.path, _LOCK_SECONDS):
                merge.detach_from(self.survey.built_on(point.id), point)
                leftover = PendingPoint(self.directory.path, self.directory.name, point.id)
                leftover.uncommit()
        except Locked as err:
            self.outcome.in_use.add(point.id)
            self._leave(f"{point.id} is dropped, but its directory stays for now: {err.message}")
            return
        with self.outcome.freeing(point.id, leftover.path):
            leftover.drop()  # what a crash leaves of it the recovery of the next run removes
        self.outcome.removed.append(point.id)

    def _merge(self, lower: Point, upper: Point, disk: DiskName) -> None:
        """Do steps 1 to 3 of a merge; `_next` then finds step 4, the exchange of the images."""
        self.reporter.event(StepStarted(f"merge {disk} of {upper.id} into {lower.id}"))
        try:
            one = Merge.of(upper, chain.layers(self.directory, upper, disk))
            with ExitStack() as held:
                held.enter_context(self.outcome.freeing(lower.id, lower.path, upper.path))
                with locks.directory(lower.path, _LOCK_SECONDS):
                    # The exclusive lock shows that nobody reads the lower layer itself, and it is no longer a
                    # point. Whoever comes after the marker reads it through the upper layer, which masks
                    # all that will be written. Without the lock an earlier reader would see it change.
                    image = held.enter_context(one.mark())
                try:
                    written_bytes = copy_layer.copy_layer(
                        one, image, check=self._check, progress=partial(self._progress, disk)
                    )
                except BackupctlError:
                    one.abandon()  # otherwise a full store would stay full until the next prune
                    raise
                one.describe(image)
        except Locked as err:
            self._skip(upper, disk, f"{disk} of {upper.id} is not merged: {err.message}")
        except DamageFound as err:
            self.outcome.damage.append(err.message)
            self._skip(upper, disk, f"{disk} of {upper.id} is not merged: {err.message}")
        else:
            self.outcome.merged.append(MergedLayer(upper.id, disk, lower.id, written_bytes))

    def _switch(self, point: Point, entry: DiskEntry) -> None:
        try:
            with ExitStack() as held:
                held.enter_context(locks.directory(point.path, _LOCK_SECONDS))
                below = self.directory.path / str(entry.parent)
                with suppress(FileNotFoundError):  # removed already: a crash came after the rename
                    held.enter_context(locks.directory(below, _LOCK_SECONDS))
                with self.outcome.freeing(PointId(str(entry.parent)), point.path, below):
                    done = merge.swap_images(point, entry)
        except Locked as err:
            self._skip(point, entry.name, f"{entry.name} of {point.id} is not exchanged: {err.message}")
            return
        after = done.manifest.disk(entry.name)
        assert after is not None
        Layer.of(done, after).check()

    def _progress(self, disk: DiskName, done_bytes: int, total_bytes: int) -> None:
        self.reporter.progress(disk, done_bytes, total_bytes)

    def _check(self) -> None:
        """Raise what must end a merge; a removal takes no space and is not ended by a full store."""
        self.stop.check()
        self.filling.check(WriteFailed)

    def _skip(self, upper: Point, disk: str, why: str) -> None:
        self.outcome.skipped.add((upper.id, disk))
        self._leave(why)

    def _leave(self, why: str) -> None:
        self.outcome.left.append(why)
        self.reporter.event(LeftForNextPrune(why))
