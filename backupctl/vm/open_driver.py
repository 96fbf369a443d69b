# SPDX-License-Identifier: GPL-2.0-or-later
"""The one place that knows which driver a VM of the configuration needs."""

from contextlib import AbstractContextManager

from backupctl.cancel import Cancellation
from backupctl.options import Timeouts, VmConfig
from backupctl.vm.driver import Driver
from backupctl.vm.guest import agent
from backupctl.vm.qmp.driver import connect


def open_driver(
    vm: VmConfig, timeouts: Timeouts, cancel: Cancellation | None = None
) -> AbstractContextManager[Driver]:
    """Connect to a VM for as long as the block lasts. Raises MonitorUnreachable, Interrupted.

    cancel: looked at while nobody answers.
    """
    if vm.access.qmp.remote:
        from backupctl.vm.remote import driver  # noqa: PLC0415 - few VMs need what it loads

        return driver.connect(vm, vm.access, timeouts, cancel)
    return connect(vm, vm.access, timeouts, cancel)


def is_remote(vm: VmConfig) -> bool:
    """Whether the VM runs on another host: the scratch directory is there then."""
    return vm.access.qmp.remote


def can_freeze(vm: VmConfig) -> bool:
    """Whether a guest agent is configured."""
    return vm.access.agent is not None


def freeze_status(vm: VmConfig, timeouts: Timeouts) -> str:
    """Return "thawed" or "frozen", as the guest agent remembers it. Raises AgentError.

    `can_freeze` must be true. Needs no open driver.
    """
    assert vm.access.agent is not None
    if is_remote(vm):
        from backupctl.vm.remote import host  # noqa: PLC0415 - as above

        return host.freeze_status(vm.access, timeouts)
    with agent.Agent.connect(vm.access.agent, timeouts.agent_seconds) as connection:
        return connection.freeze_status()


def thaw_if_frozen(vm: VmConfig, timeouts: Timeouts) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError.

    Needs no open driver: a guest must not wait for a monitor that somebody else holds.
    """
    address = vm.access.agent
    if address is not None and is_remote(vm):
        from backupctl.vm.remote import host  # noqa: PLC0415 - as above

        return host.thaw_if_frozen(vm.access, timeouts)
    return address is not None and agent.thaw_if_frozen(address, timeouts.agent_seconds)
