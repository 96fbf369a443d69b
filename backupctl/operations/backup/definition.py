# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run stores of the VM beside its disks: asked in two parts, stored in one."""

from backupctl.events.backup import DefinitionIncomplete
from backupctl.options import RunOptions
from backupctl.progress import Reporter
from backupctl.repository.stored_files import NewFile
from backupctl.vm.definition import Definition
from backupctl.vm.driver import Driver


def asked(driver: Driver, options: RunOptions, reporter: Reporter) -> Definition:
    """Ask what the VM is, before it is touched; report what is left out.

    Raises UsageError for a file that the user named and that cannot be read, MonitorError.
    """
    named = driver.included(options.include)
    return _reported(driver.definition() + named, reporter)


def state(driver: Driver, options: RunOptions, reporter: Reporter) -> Definition:
    """Read the state files of the VM, after the point in time; report what is left out.

    Raises MonitorError.
    """
    return _reported(driver.state_files(firmware=options.firmware), reporter)


def to_store(definition: Definition) -> tuple[NewFile, ...]:
    """Return the files as the repository takes them."""
    return tuple(NewFile(one.name, one.kind, one.origin, one.content) for one in definition.files)


def _reported(definition: Definition, reporter: Reporter) -> Definition:
    for why in definition.omitted:
        reporter.event(DefinitionIncomplete(why))
    return definition
