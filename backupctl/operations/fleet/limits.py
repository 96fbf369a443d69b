# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of several VMs may be worked on at once: a pure function."""

from collections.abc import Sequence
from dataclasses import dataclass

from backupctl.names import VmName


@dataclass(frozen=True)
class Job:
    """The work on one VM. command: the program that does it.

    storage: where its repository is. monitor: the monitor of the VM, which serves one client at a time; one
    VM that is backed up to two repositories is two VMs of the configuration. host: where the VM runs, "" for
    this machine.
    """

    vm: VmName
    command: tuple[str, ...]
    storage: str
    monitor: str
    host: str = ""


@dataclass(frozen=True)
class Limits:
    """How many jobs may run at once: all together, on one storage, and on the VMs of one host.

    per_host: None for no such limit.
    """

    jobs: int = 1
    per_storage: int = 1
    per_host: int | None = None


def next_job(waiting: Sequence[Job], running: Sequence[Job], limits: Limits) -> Job | None:
    """Return the first job that may start now; None if none may. One always may if none is running."""
    if len(running) >= limits.jobs:
        return None
    busy = {one.monitor for one in running}
    storages, hosts = [one.storage for one in running], [one.host for one in running]
    per_host = limits.jobs if limits.per_host is None else limits.per_host
    return next(
        (
            one
            for one in waiting
            if one.monitor not in busy
            and storages.count(one.storage) < limits.per_storage
            and hosts.count(one.host) < per_host
        ),
        None,
    )
