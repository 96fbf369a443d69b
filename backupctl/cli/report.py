# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl report`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import click

from backupctl import __version__
from backupctl.cancel import Cancellation
from backupctl.cli import check, common, monitored, output, param_types, prune, reporters, units
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, DamageFound
from backupctl.monitoring import memory
from backupctl.names import VmName
from backupctl.operations.check import Limits
from backupctl.operations.prune import retention
from backupctl.operations.report import gather
from backupctl.operations.report import write as files
from backupctl.operations.report.facts import LastResult, LastResults, Report, RepositoryFacts
from backupctl.operations.report.gather import VmRequest
from backupctl.outcome import documents
from backupctl.outcome.html import page
from backupctl.progress import counted
from backupctl.repository.repository import Repository

DEFAULT_MAPS = 30
MOST_MAPS = 400


@common.command(
    "report",
    0,
    1,
    2,
    4,
    examples=(
        ("All VMs, as a page for the browser", "backupctl report --html /srv/backups.html"),
        ("Two VMs, without the maps of their disks", "backupctl report web db --html report.html --maps 0"),
    ),
)
@common.named(needs_vm=False, optional=True, several=True)
@click.option(
    "--html",
    "path",
    type=param_types.PATH,
    metavar="FILE",
    required=True,
    help="Write the page to this file; an earlier report in it is replaced.",
)
@click.option(
    "--maps",
    type=click.IntRange(0, MOST_MAPS),
    metavar="N",
    default=DEFAULT_MAPS,
    show_default=True,
    help="Draw which parts of each disk the newest N points store; 0 for no maps.",
)
@click.option("--force", is_flag=True, help="Replace FILE even if it is not a report.")
@common.json_option
@common.quiet
def report(target: Target, *, path: Path, maps: int, force: bool, as_json: bool, quiet: bool) -> None:
    """Write a page about the recovery points of VMs, or of all VMs in every configured repository.

    It has a time line, sizes, durations, chains, what the next prune drops, and a map of each disk. The page
    is one file that fetches nothing. The VM is not needed, and stored data is not read: `verify` does that.
    """
    stop = Cancellation()
    with stop.on_signals(), reporters.reporter(quiet=quiet) as reporter:
        where = files.destination(path, target.by_repository(), page.MARK, force=force)
        work = _Work(target, maps, datetime.now(UTC), stop)
        found = Report(work.now, __version__, tuple(work.repositories()))
        content = page.render(found)
        stop.check()
        files.write(where, content, page.MARK, force=force, warn=reporter.event)
    output.done(f"{where} is written")
    if as_json:
        output.print_json(documents.report(found, where, len(content)))
    elif not quiet:
        output.print_line(f"wrote {where}: {counted(len(found.vms), 'VM')}, {units.size(len(content))}")
    if found.is_damaged:
        err = DamageFound(f"there are damaged points; {where} shows them", next_command="backupctl verify")
        work.failures.append(err)
    if work.failures:
        raise common.worst(work.failures)


@dataclass
class _Work:
    """The look at all that is meant. failures: why some of it could not be looked at."""

    target: Target
    maps: int
    now: datetime
    stop: Cancellation

    def __post_init__(self) -> None:
        self.failures: list[BackupctlError] = []

    def repositories(self) -> Iterator[RepositoryFacts]:
        """Yield each repository; one that cannot be opened hides no other. Raises Interrupted."""
        for path, names in self.target.by_repository().items():
            try:
                opened = self.target.open(path)
                vms = [self._request(opened, vm) for vm in self._vms(opened, names)]
            except BackupctlError as err:
                self.failures.append(err)
                yield RepositoryFacts(str(path), problem=err.message)
                continue
            yield gather.repository(path, vms, self.now, self.stop)

    def _vms(self, repository: Repository, names: Sequence[VmName | None]) -> list[VmName]:
        """Return the VMs that are meant; of all, those too that are configured and never were backed up."""
        named = {vm for vm in names if vm}
        if None in names:
            named |= set(repository.vms())
            if not self.target.typed_repository:
                configured = (self.target.of(vm) for vm in self.target.config.vms)
                named |= {one.vm_name for one in configured if one.repository_path == repository.path}
        return sorted(named)

    def _request(self, repository: Repository, vm: VmName) -> VmRequest:
        # The directory decides, not the name: a VM may be configured for another repository by now.
        target = replace(self.target.of(vm), repository_path=repository.path)
        configured = target.config.of(vm)
        remembered = monitored.is_remembered(target)
        return VmRequest(
            repository.vm(vm),
            Limits(
                retention.duration(configured.max_age or check.DEFAULT_MAX_AGE),
                retention.duration(configured.warn_age) if configured.warn_age else None,
            ),
            prune.configured_rules(target),
            _last(target) if remembered else None,
            tuple(check.remembered(target)),
            self.maps,
        )


def _last(target: Target) -> LastResults:
    directory = monitored.state_directory(target.config)
    known = memory.read(directory, target.vm_name, str(target.directory()))
    return LastResults(*(_result(past.last) for past in (known.backup, known.verify, known.prune)))


def _result(record: memory.Record | None) -> LastResult | None:
    if record is None:
        return None
    try:
        ended = datetime.fromtimestamp(record.ended, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return LastResult(record.command, ended, record.seconds, record.reason, record.partial)
