# SPDX-License-Identifier: GPL-2.0-or-later
"""What would make a run fail, or may surprise who relies on it: looked for before it matters.

Nothing is changed in the VM. On the disk nothing is left: what is tried in a directory is removed again (see
`trials`). The agent is asked whether the guest is frozen, no more.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.errors import (
    AgentError,
    BackupctlError,
    MonitorError,
    NotARepository,
    Refused,
    RepositoryError,
)
from backupctl.events.repository import PointGone
from backupctl.finding import Finding, Verdict
from backupctl.names import VmName
from backupctl.operations import other_tools, recover, status
from backupctl.operations.bitmaps import Known, nobody_else
from backupctl.operations.doctor import trials
from backupctl.options import RunOptions, VmConfig
from backupctl.progress import counted
from backupctl.repository.repository import Repository
from backupctl.system import files, qemu_tools
from backupctl.vm.disk import Inventory
from backupctl.vm.driver import Driver, Foreseen
from backupctl.vm.open_driver import agent_place, can_freeze, freeze_status, is_remote, open_driver
from backupctl.vm.scratch_directory import LOW_BYTES


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at."""

    vm: VmName
    findings: tuple[Finding, ...]

    @property
    def bad(self) -> tuple[Finding, ...]:
        """What makes a run fail."""
        return tuple(one for one in self.findings if one.verdict == "bad")


def examine(vm: VmConfig, path: Path, options: RunOptions, known: Known = nobody_else) -> Diagnosis:
    """Look at all that a run with these options needs.

    path: the repository's, which need not exist yet. known: see `status.look`.
    """
    repository = None
    with suppress(BackupctlError):
        repository = Repository.open(path)
    found = [*_tools(), *_repository(vm, path), *_trials(vm, path, options)]
    if repository is not None and (holder := repository.vm(vm.name).lock_holder()):
        found.append(
            Finding(
                "monitor",
                "warning",
                holder,
                "the monitor serves one client at a time; check again after the run",
            )
        )
    else:
        found += _vm(vm, repository, path, options, known)
    return Diagnosis(vm.name, tuple(found))


def _tools() -> Iterator[Finding]:
    programs = qemu_tools.img_program(), qemu_tools.server_program()
    if missing := [program for program in programs if shutil.which(program) is None]:
        advice = "apt install qemu-utils qemu-system-common (or set QEMU_IMG, QEMU_STORAGE_DAEMON)"
        yield Finding("tools", "bad", f"not found: {' and '.join(missing)}", advice)
    else:
        yield Finding("tools", "ok", f"{' and '.join(programs)} are installed")


def _repository(vm: VmConfig, path: Path) -> Iterator[Finding]:
    try:
        directory = Repository.open(path).vm(vm.name)
        survey, problems = directory.scan_points(), status.problems(directory)
    except NotARepository:
        yield from _no_repository(vm, path)
        return
    except BackupctlError as err:
        yield Finding("repository", "bad", err.message)
        return
    if locked := _locked(path) or _locked(directory.path):
        yield Finding("repository", "bad", locked)
        return
    said = f"{path}: {counted(len(survey.points), 'point')} of {vm.name}; {_free(path)}"
    yield Finding("repository", "ok", said)
    for _, damage in survey.damaged:
        yield Finding("repository", "warning", damage.message, f"backupctl verify {vm.name}")
    for problem in problems:
        yield Finding("repository", "warning", problem, f"backupctl verify {vm.name}")


def _trials(vm: VmConfig, path: Path, options: RunOptions) -> Iterator[Finding]:
    """What a run will do in its directories, tried."""
    with suppress(NotARepository, OSError):
        if os.path.lexists(path):
            Repository.refuse_foreign(path)  # nothing is tried in a directory of somebody else
        yield from trials.of_repository(path)
    if not is_remote(vm):
        yield from trials.of_scratch(options.scratch.directory)
    yield from trials.of_temporary()


def _no_repository(vm: VmConfig, path: Path) -> Iterator[Finding]:
    if os.path.lexists(path):
        try:
            Repository.refuse_foreign(path)
        except (NotARepository, OSError) as err:
            yield Finding("repository", "bad", str(err))
            return
    if locked := _locked(path):
        yield Finding("repository", "bad", locked)
        return
    said = f"none in {path} yet; `backupctl full {vm.name}` creates it. {_free(path)}"
    yield Finding("repository", "warning", said, "if you expected one, check that its file system is mounted")


def _locked(path: Path) -> str:
    """Say why nothing can be written to a directory, or made where it is missing; "" if it can."""
    there = _existing(path)
    if os.access(there, os.W_OK | os.X_OK):
        return ""
    return f"cannot write to {there}: permission denied, or a read-only file system"


def _existing(path: Path) -> Path:
    return next(one for one in (path.absolute(), *path.absolute().parents) if os.path.lexists(one))


def _free(path: Path) -> str:
    return f"{_size(files.free_bytes(_existing(path)))} free"


def _vm(
    vm: VmConfig, repository: Repository | None, path: Path, options: RunOptions, known: Known
) -> Iterator[Finding]:
    """What the VM itself tells."""
    try:
        with open_driver(vm, options.timeouts.brief()) as driver:
            has_guest = driver.has_guest
            yield from driver.findings(options)
            yield from _other_tools(driver, vm)
            yield from _disks(vm, driver, repository, path, options)
    except (MonitorError, Refused) as err:
        yield Finding("monitor", "bad", err.message, err.hint)
        return
    if has_guest:
        yield from _agent(vm, options)
    if repository is not None:
        try:
            yield from _history(vm, repository, options, known)
        except RepositoryError as err:
            yield Finding("chain", "bad", err.message, "make the repository readable again")


def _other_tools(driver: Driver, vm: VmConfig) -> Iterator[Finding]:
    for one in other_tools.found(driver, vm):
        yield Finding(
            "other tools", "ok", one.said, f"if you have left it, this removes them: {'; '.join(one.removal)}"
        )


def _disks(
    vm: VmConfig, driver: Driver, repository: Repository | None, path: Path, options: RunOptions
) -> Iterator[Finding]:
    try:
        foreseen = _foreseen(vm, driver, repository)
        inventory = foreseen.inventory
        yield from _media(inventory)
        if not foreseen.leftovers:
            inventory.refuse_busy()  # else the job may be a dead run's
        if why := driver.view_error(options.view, inventory.disks):
            yield Finding("view", "bad", f"{options.view} is not available: {why}", 'view = "fleecing"')
    except Refused as err:
        yield Finding("disks", "bad", err.message)
        return
    if inventory.disks:
        yield from _filling(driver, inventory, path, options)
        yield from _scratch(driver, inventory, options)
        yield from _room(inventory, repository, path)


def _foreseen(vm: VmConfig, driver: Driver, repository: Repository | None) -> Foreseen:
    """Return the disks as a run will see them, which cleans up first what a dead one left."""
    if repository is None:
        return Foreseen(driver.inventory(), ())
    return driver.foresee(recover.DirectoryFacts(repository.vm(vm.name), repository.owner))


def _media(inventory: Inventory) -> Iterator[Finding]:
    found = ", ".join(f"{one.name} ({_size(one.size)}, {one.driver})" for one in inventory.disks)
    yield Finding("disks", "ok", found) if found else Finding("disks", "bad", "the VM has no writable disk")
    for name, why in inventory.skipped:
        yield Finding("disks", "ok", f"{name} is left out: {why}")
    if transient := [one.name for one in inventory.disks if not one.persistent]:
        yield Finding(
            "disks",
            "warning",
            f"{', '.join(transient)} cannot store a dirty bitmap: the first incremental after each QEMU "
            "restart reads the whole disk",
            "qcow2 of version 3 (compat=1.1) without a data file can",
        )
    if encrypted := [one.name for one in inventory.disks if one.encrypted]:
        yield Finding(
            "disks",
            "warning",
            f"{', '.join(encrypted)}: encrypted in the VM; a point holds what the guest sees, in plain text",
            "encrypt the repository's file system",
        )


def _filling(driver: Driver, inventory: Inventory, path: Path, options: RunOptions) -> Iterator[Finding]:
    """Whether what a run fills is what a guest may need."""
    found = driver.filling((_existing(path),), inventory.disks)
    with suppress(Refused):  # a missing directory is told of elsewhere
        found = (*found, driver.scratch_filling(options.scratch.directory, inventory.disks))
    for one in {(type(one), one.directory): one for one in found}.values():
        if who := one.who():
            verdict: Verdict = "bad" if one.free_bytes() < LOW_BYTES else "ok"
            limit = _size(LOW_BYTES)
            said = f"file system of {one.directory}: {who}. A run stops when less than {limit} are free"
            yield Finding(
                "file system",
                verdict,
                said,
                "" if verdict == "ok" else "free some space, or use another disk",
            )


def _scratch(driver: Driver, inventory: Inventory, options: RunOptions) -> Iterator[Finding]:
    directory = options.scratch.directory
    try:
        filling = driver.scratch_filling(directory, inventory.disks)
        budgets = driver.plan_scratch(inventory.disks, options.scratch, filling.who())
    except Refused as err:
        yield Finding("scratch", "bad", err.message)
        return
    size, wanted = sum(one.size for one in budgets), sum(one.ideal_bytes for one in budgets)
    said = f"{directory}: a run reserves {_size(size)}"
    if size < wanted:
        said += f"; {_size(wanted)} are needed if the guest overwrites all of its data meanwhile"
        yield Finding("scratch", "warning", said, "more space, or another directory: scratch, --scratch")
    else:
        yield Finding("scratch", "ok", said)


def _room(inventory: Inventory, repository: Repository | None, path: Path) -> Iterator[Finding]:
    """Whether what the next run may store has room in the repository."""
    free, most = files.free_bytes(_existing(path)), 0
    for disk in inventory.disks:
        ours = [one for one in disk.bitmaps if repository and repository.owner.point_of(one.name)]
        marked = [one.dirty_bytes for one in ours if one.recording and not one.inconsistent]
        most += min(marked, default=disk.held_bytes)
    if most > free:
        said = f"the next run may store {_size(most)}; {_size(free)} are free"
        yield Finding("repository", "warning", said, "backupctl prune, or more space")


def _agent(vm: VmConfig, options: RunOptions) -> Iterator[Finding]:
    if options.freeze.mode == "never":
        return
    without: Verdict = "bad" if options.freeze.mode == "require" else "warning"
    costs = "the run is refused" if options.freeze.mode == "require" else "points are crash-consistent"
    if not can_freeze(vm):
        yield Finding(
            "agent",
            without,
            f"no agent is configured, so {costs}",
            "set agent in the configuration, or use --agent",
        )
        return
    try:
        frozen = freeze_status(vm, options.timeouts)
    except AgentError as err:
        yield Finding(
            "agent", without, f"{err.message}: so {costs}", "check that qemu-guest-agent runs in the guest"
        )
        return
    if frozen == "frozen":
        advice = (
            f"backupctl recover {vm.name}, if a run of backupctl crashed; otherwise find out who froze them"
        )
        yield Finding("agent", "bad", "the guest's file systems are frozen", advice)
    else:
        yield Finding("agent", "ok", f"answers at {agent_place(vm)}; the guest is not frozen")


def _history(vm: VmConfig, repository: Repository, options: RunOptions, known: Known) -> Iterator[Finding]:
    """What earlier runs left, and what the next one makes of it."""
    found = status.look(vm, repository, options, known)
    for point in found.gone:
        said = PointGone(vm.name, point, repository.path).text
        yield Finding("repository", "warning", said, "look for it in copies of the repository")
    for left in found.leftovers:
        yield Finding(
            "leftovers",
            "warning",
            left,
            f"the next run cleans this up; `backupctl recover {vm.name}` does it now",
        )
    yield from _bitmaps(vm, found)
    for gone in found.missing_disks:
        advice = (
            "attach it again or correct its name in the configuration; one run without it ends this warning"
        )
        yield Finding("missing", "warning", str(gone), advice)
    broken: Verdict = "bad" if options.chain.on_broken == "fail" else "warning"
    for disk in found.disks:
        if disk.reason:
            yield Finding("chain", broken, f"{disk.name}: {disk.reason}")
    yield Finding("next run", "ok", found.next_run)


def _bitmaps(vm: VmConfig, found: status.Status) -> Iterator[Finding]:
    """The bitmaps that stay for ever, since no run removes them."""
    for one in found.bitmaps:
        if one.use in ("orphan", "other-vm"):
            advice = f"if nothing needs it: backupctl bitmaps {vm.name} --remove {one.name}"
            if not one.known:
                advice = f"if it is gone: backupctl bitmaps {vm.name} --remove-repository {one.repository}"
            yield Finding("bitmaps", "warning", f"{one.name} on {one.node}: {one.why}", advice)


def _size(count: int) -> str:
    return f"{count / (1 << 30):,.1f} GiB" if count >> 30 else f"{count >> 20} MiB"
