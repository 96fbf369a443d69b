# SPDX-License-Identifier: GPL-2.0-or-later
"""The one place that knows which driver a VM of the configuration needs."""

from contextlib import AbstractContextManager

from backupctl.cancel import Cancellation
from backupctl.options import LibvirtAccess, Timeouts, VmConfig
from backupctl.vm.driver import Driver
from backupctl.vm.guest import agent
from backupctl.vm.libvirt import agent as libvirt_agent
from backupctl.vm.qmp.driver import connect


def open_driver(
    vm: VmConfig, timeouts: Timeouts, cancel: Cancellation | None = None
) -> AbstractContextManager[Driver]:
    """Connect to a VM for as long as the block lasts. Raises MonitorUnreachable, Interrupted.

    cancel: looked at while nobody answers.
    """
    if isinstance(vm.access, LibvirtAccess):
        from backupctl.vm.libvirt.driver import connect as connect_libvirt  # noqa: PLC0415 - few need it

        return connect_libvirt(vm, vm.access, timeouts, cancel)
    return connect(vm, vm.access, timeouts, cancel)


def can_freeze(vm: VmConfig) -> bool:
    """Whether a guest agent is configured; libvirt knows by itself whether a domain has one."""
    return isinstance(vm.access, LibvirtAccess) or vm.access.agent is not None


def agent_place(vm: VmConfig) -> str:
    """Say where the guest agent answers, for people."""
    if isinstance(vm.access, LibvirtAccess):
        return f"libvirt's agent channel of {vm.access.domain}"
    return str(vm.access.agent)


def freeze_status(vm: VmConfig, timeouts: Timeouts) -> str:
    """Return "thawed" or "frozen", as the guest agent remembers it. Raises AgentError.

    `can_freeze` must be true. Needs no open driver.
    """
    if isinstance(vm.access, LibvirtAccess):
        with libvirt_agent.LibvirtAgent.connect(
            vm.access.uri, vm.access.domain, timeouts.agent_seconds
        ) as talk:
            return talk.freeze_status()
    assert vm.access.agent is not None
    with agent.Agent.connect(vm.access.agent, timeouts.agent_seconds) as connection:
        return connection.freeze_status()


def thaw_if_frozen(vm: VmConfig, timeouts: Timeouts) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError.

    Needs no open driver: a guest must not wait for a monitor that somebody else holds.
    """
    if isinstance(vm.access, LibvirtAccess):
        return libvirt_agent.thaw_if_frozen(vm.access.uri, vm.access.domain, timeouts.agent_seconds)
    address = vm.access.agent
    return address is not None and agent.thaw_if_frozen(address, timeouts.agent_seconds)
