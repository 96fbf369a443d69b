# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics of all VMs that are meant, as `report --metrics` serves them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from backupctl.cancel import Cancellation
from backupctl.cli import monitored
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError
from backupctl.monitoring import exposition, memory, metrics, scrape
from backupctl.monitoring.exposition import Gauge
from backupctl.monitoring.memory import Memory
from backupctl.monitoring.metrics import Stored
from backupctl.names import VmName
from backupctl.repository.repository import Repository
from backupctl.system import listen

_LOCAL = "metrics tell of all VMs, and are not encrypted on their way"
_FROM_AFAR = (
    "listen on 127.0.0.1 behind a web server that has TLS, or use node_exporter's: textfile in [metrics] "
    "names the directory of its files"
)


def serve(target: Target, where: str, *, ready: Callable[[str], None], stop: Cancellation) -> None:
    """Serve the metrics until asked to stop. where: HOST:PORT. ready: called with the URL.

    Raises UsageError, RepositoryError.
    """
    target.by_repository()  # what is wrong with the command line is known before anybody connects
    host, port = listen.tcp_address(where, why_here=_LOCAL, hint=_FROM_AFAR)
    with listen.tcp(host, port) as listening:
        scrape.serve(listening, scrape.Metrics(partial(text, target)), ready=ready, stop=stop)


def text(target: Target) -> str:
    """Return the metrics of the VMs, in Prometheus's format. Raises UsageError, RepositoryError.

    Of a repository that cannot be opened there is what is remembered of its VMs.
    """
    return exposition.text(_gauges(target))


def _gauges(target: Target) -> Iterator[Gauge]:
    for path, names in target.by_repository().items():
        opened = _opened(target, path)
        for vm in target.vms_of(path, opened, names):
            yield from _of_vm(replace(target.of(vm), repository_path=path), opened)


def _opened(target: Target, path: Path) -> Repository | None:
    try:
        return target.open(path)
    except BackupctlError:
        return None


def _of_vm(target: Target, opened: Repository | None) -> Iterator[Gauge]:
    path, vm = target.directory(), target.vm_name
    known = Memory(repository=str(path))
    if monitored.is_remembered(target):
        known = memory.read(monitored.state_directory(target.config), vm, str(path))
    yield from metrics.gauges(vm, known, path, _stored(opened, vm))


def _stored(opened: Repository | None, vm: VmName) -> Stored | None:
    try:
        return metrics.look(opened.vm(vm)) if opened else None
    except BackupctlError:
        return None
