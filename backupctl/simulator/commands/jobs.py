# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs."""

from typing import Any

from backupctl.simulator.commands.table import Arguments, command
from backupctl.simulator.failure import CommandError
from backupctl.simulator.jobs import Job
from backupctl.simulator.machine import Machine


@command("query-jobs")
def query_jobs(vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return all jobs."""
    return [job.describe() for job in vm.jobs.jobs.values()]


@command("query-block-jobs")
def query_block_jobs(vm: Machine, _given: Arguments) -> list[dict[str, Any]]:
    """Return all block jobs, in the older form."""
    return [job.describe_block() for job in vm.jobs.jobs.values()]


@command("block-job-cancel", {"device": "str", "force?": "bool"})
def block_job_cancel(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Cancel a job."""
    name = given["device"]
    if name not in vm.jobs.jobs:
        raise CommandError(f"Block job '{name}' not found", "DeviceNotActive")
    vm.jobs.cancel(vm.jobs.jobs[name])
    return {}


@command("job-cancel", {"id": "str"})
def job_cancel(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Cancel a job."""
    vm.jobs.cancel(_job(vm, given))
    return {}


@command("job-dismiss", {"id": "str"})
def job_dismiss(vm: Machine, given: Arguments) -> dict[str, Any]:
    """Delete a job that has ended."""
    vm.jobs.dismiss(_job(vm, given))
    return {}


def _job(vm: Machine, given: Arguments) -> Job:
    if given["id"] not in vm.jobs.jobs:
        raise CommandError("Job not found")
    return vm.jobs.jobs[given["id"]]
