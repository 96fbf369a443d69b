# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl report`."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from backupctl import __version__
from backupctl.cancel import Cancellation
from backupctl.cli import (
    check,
    common,
    monitored,
    output,
    param_types,
    reporters,
    retention_rules,
    units,
    vm_argument,
)
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError, DamageFound, UsageError
from backupctl.monitoring import memory
from backupctl.names import VmName
from backupctl.operations.check import Limits
from backupctl.operations.prune import retention
from backupctl.operations.report import gather, progress
from backupctl.operations.report import write as files
from backupctl.operations.report.facts import LastResult, LastResults, Report, RepositoryFacts
from backupctl.operations.report.gather import VmRequest
from backupctl.outcome import documents
from backupctl.outcome.html import page, words
from backupctl.progress import Reporter, counted
from backupctl.repository.repository import Repository
from backupctl.system import listen

_LOCAL = "a report tells of all VMs, and is not encrypted on its way"
_FROM_AFAR = "listen on 127.0.0.1, and connect with ssh -L 8080:127.0.0.1:8080 HOST"
DEFAULT_MAPS = 30
MOST_MAPS = 400
_PAGE_MAPS = 1500
"""As many rows of maps a page has without --maps: of many VMs, each has fewer. One row compares nothing."""
_LEAST_MAPS = 2
_PAGE_POINTS = 5000
_LEAST_POINTS = 5


@dataclass(frozen=True)
class Asked:
    """The options of the command, by their names. path: of --html. One of path, web and metrics is given."""

    path: Path | None
    web: str | None
    metrics: str | None
    maps: int | None
    points: int | None
    force: bool
    as_json: bool
    quiet: bool


@common.command(
    "report",
    0,
    1,
    2,
    4,
    examples=(
        ("All VMs, as a page for the browser", "backupctl report --html /srv/backups.html"),
        ("Two VMs, without the maps of their disks", "backupctl report web db --html report.html --maps 0"),
        ("A page that shows running backups, until Ctrl-C", "backupctl report --web 8080"),
        ("Metrics for Prometheus, until Ctrl-C", "backupctl report --metrics 9876"),
    ),
)
@vm_argument.Named(needs_vm=False, optional=True, several=True)
@click.option(
    "--html",
    "path",
    type=param_types.PATH,
    metavar="FILE",
    help="Write the page to this file; an earlier report in it is replaced.",
)
@click.option(
    "--web",
    metavar="[HOST:]PORT",
    help="Serve the page on this machine, with what works on each VM now; port 0 is any free port.",
)
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve no page, but metrics for Prometheus, at /metrics on this machine; port 0 is any free port.",
)
@click.option(
    "--maps",
    type=click.IntRange(0, MOST_MAPS),
    metavar="N",
    help=f"Draw which parts of each disk the newest N points store; 0 for no maps. Default: {DEFAULT_MAPS}, "
    "fewer of many VMs.",
)
@click.option(
    "--points",
    type=click.IntRange(1),
    metavar="N",
    help=f"Show the newest N points of each VM one by one, and the older ones as a sum. Default: all, unless "
    f"the page had more than {_PAGE_POINTS:,}.",
)
@click.option("--force", is_flag=True, help="Replace FILE even if it is not a report.")
@common.json_option
@common.quiet
@common.gathered(Asked)
def report(target: Target, asked: Asked) -> None:
    """Write a page about the recovery points of VMs, or of all VMs in every configured repository.

    It has a time line, sizes, durations, chains, what the next prune drops, and a map of each disk. The page
    is one file that fetches nothing. The VM is not needed, and stored data is not read: `verify` does that.
    """
    if sum(one is not None for one in (asked.path, asked.web, asked.metrics)) != 1:
        raise UsageError("use one of --html FILE, --web PORT and --metrics PORT")
    stop = Cancellation()
    with stop.on_signals(), reporters.reporter(quiet=asked.quiet) as reporter:
        if asked.path is not None:
            _write(target, asked, asked.path, stop, reporter)
        elif asked.web is not None:
            _serve(target, asked, asked.web, stop)
        else:
            from backupctl.cli import metrics  # noqa: PLC0415 - as of `live` below

            metrics.serve(target, asked.metrics or "", ready=partial(_ready, asked), stop=stop)


def _write(target: Target, asked: Asked, path: Path, stop: Cancellation, reporter: Reporter) -> None:
    """Write the page into a file."""
    where = files.destination(path, target.by_repository(), page.MARK, force=asked.force)
    work = _Work(target, asked, datetime.now(UTC), stop)
    found = work.report()
    content = page.render(found)
    stop.check()
    files.write(where, content, page.MARK, force=asked.force, warn=reporter.event)
    output.done(f"{where} is written")
    if asked.as_json:
        output.print_json(documents.report(found, where, len(content)))
    elif not asked.quiet:
        output.print_line(f"wrote {where}: {counted(len(found.vms), 'VM')}, {units.size(len(content))}")
    if found.is_damaged:
        err = DamageFound(f"there are damaged points; {where} shows them", next_command="backupctl verify")
        work.failures.append(err)
    if work.failures:
        raise common.worst(work.failures)


def _serve(target: Target, asked: Asked, web: str, stop: Cancellation) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    from backupctl.outcome.html import live  # noqa: PLC0415 - http.server takes a sixth of a small report's start

    def render(version: str) -> bytes:
        return page.render(_Work(target, asked, datetime.now(UTC), stop).report(), live=version)

    def look() -> dict[str, Any]:
        doing, version = _Work(target, asked, datetime.now(UTC), stop).look()
        return live.document(doing, version)

    target.by_repository()  # what is wrong with the command line is known before anybody connects
    host, port = listen.tcp_address(web, why_here=_LOCAL, hint=_FROM_AFAR)
    with listen.tcp(host, port) as listening:
        live.serve(listening, live.LivePage(render, look), ready=partial(_ready, asked), stop=stop)


def _ready(asked: Asked, address: str) -> None:
    """Print where it is served."""
    if asked.as_json:
        output.print_json(documents.report_served(address))
    else:
        output.print_table(("URL",), [(address,)])


@dataclass
class _Work:
    """The look at all that is meant. failures: why some of it could not be looked at."""

    target: Target
    asked: Asked
    now: datetime
    stop: Cancellation

    def __post_init__(self) -> None:
        self.failures: list[BackupctlError] = []

    def report(self) -> Report:
        """Return all that is reported. Raises Interrupted."""
        return Report(self.now, __version__, tuple(self.repositories()))

    def look(self) -> tuple[list[tuple[int, VmName, str]], str]:
        """Return what works on each VM now, and a version that changes when points come or go.

        Each VM with the number of its repository, and "" if nothing works on it.
        """
        doing, versions = [], []
        for number, (path, names) in enumerate(self.target.by_repository().items()):
            try:
                opened = self.target.open(path)
                for vm in self.target.vms_of(path, opened, names):
                    directory = opened.vm(vm)
                    versions.append(progress.version(directory))
                    doing.append((number, vm, words.doing(progress.of(directory, self.now))))
            except BackupctlError as err:
                versions.append(err.message)
        return doing, hashlib.sha256("\n".join(versions).encode(errors="replace")).hexdigest()[:16]

    def repositories(self) -> Iterator[RepositoryFacts]:
        """Yield each repository; one that cannot be opened hides no other. Raises Interrupted."""
        found: list[tuple[Path, list[VmRequest], str]] = []
        for path, names in self.target.by_repository().items():
            try:
                opened = self.target.open(path)
                found.append(
                    (path, [self._request(opened, vm) for vm in self.target.vms_of(path, opened, names)], "")
                )
            except BackupctlError as err:
                self.failures.append(err)
                found.append((path, [], err.message))
        maps, points = self._bounds([one for _, vms, _ in found for one in vms])
        for path, vms, problem in found:
            if problem:
                yield RepositoryFacts(str(path), problem=problem)
            else:
                bounded = [replace(one, maps=maps, points=points) for one in vms]
                yield gather.repository(path, bounded, self.now, self.stop)

    def _bounds(self, vms: Sequence[VmRequest]) -> tuple[int, int | None]:
        """Return of how many points of each VM the page has maps, and how many it shows; None for all."""
        each = max(len(vms), 1)
        maps, points = self.asked.maps, self.asked.points
        if maps is None:
            maps = min(DEFAULT_MAPS, _PAGE_MAPS // each)
            maps = maps if maps >= _LEAST_MAPS else 0
        if points is None and _have_more_points(vms, _PAGE_POINTS):
            points = max(_LEAST_POINTS, _PAGE_POINTS // each)
        return maps, points

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
            retention_rules.configured(target),
            _last(target) if remembered else None,
            tuple(check.remembered(target)),
        )


def _have_more_points(vms: Sequence[VmRequest], most: int) -> bool:
    """Whether VMs have more points than that together. Raises RepositoryUnreadable."""
    for one in vms:
        most -= len(one.directory.all_points())
        if most < 0:
            return True
    return False


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
