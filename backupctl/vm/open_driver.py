# SPDX-License-Identifier: GPL-2.0-or-later
"""The one place that knows which driver a VM of the configuration needs.

A VM is off if nobody listens on its monitor's socket, or if libvirt says so. A monitor that is silent, or
that cannot be reached for another reason, tells nothing of its VM, which may run. If the socket of a running
VM is named wrongly, QEMU's lock on the images tells that it runs (`offline.images`).

A driver is loaded only where it is used: every run would wait for the others.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from backupctl.cancel import Cancellation
from backupctl.errors import UNTOUCHED, MonitorUnreachable, VmIsOff
from backupctl.options import LibvirtAccess, NoMonitor, QmpAccess, Timeouts, VmConfig, WhenOff
from backupctl.system import libvirt_uri
from backupctl.vm.driver import Driver
from backupctl.vm.guest import agent
from backupctl.vm.qmp import driver as qmp

_HOW_TO_BACK_UP = "if it is off, it can be backed up by its images (--image DISK=FILE)"


@contextmanager
def open_driver(vm: VmConfig, timeouts: Timeouts, cancel: Cancellation | None = None) -> Iterator[Driver]:
    """Connect to a VM, or to the images of one that is off, for as long as the block lasts.

    cancel: looked at while nobody answers. Raises MonitorUnreachable, Refused, Interrupted.
    """
    with ExitStack() as held:
        yield _opened(vm, held, timeouts, cancel)


@contextmanager
def open_for_backup(vm: VmConfig, timeouts: Timeouts, cancel: Cancellation | None = None) -> Iterator[Driver]:
    """Connect as `open_driver`, unless the VM is off and is not to be backed up then.

    Raises VmIsOff if it is to be skipped, MonitorUnreachable, Refused, Interrupted.
    """
    with ExitStack() as held:
        yield _opened(vm, held, timeouts, cancel, when_off(vm))


def refuse_skipped(vm: VmConfig, timeouts: Timeouts) -> None:
    """Raise VmIsOff if a backup would be skipped now because the VM is off. Nothing else is tried."""
    if when_off(vm) == "skip":
        with suppress(MonitorUnreachable), open_for_backup(vm, timeouts.brief()):
            pass


def when_off(vm: VmConfig) -> WhenOff:
    """Return what a backup does with a VM that is off."""
    return vm.when_off or ("backup" if _has_images(vm) else "fail")


def _has_images(vm: VmConfig) -> bool:
    """Whether it is known which images a VM has: libvirt knows those of its domains."""
    return bool(vm.images) or isinstance(vm.access, LibvirtAccess)


def _opened(
    vm: VmConfig,
    held: ExitStack,
    timeouts: Timeouts,
    cancel: Cancellation | None,
    decided: WhenOff = "backup",
) -> Driver:
    why = "no monitor is configured"
    if not isinstance(vm.access, NoMonitor):
        try:
            return held.enter_context(_connect(vm, vm.access, timeouts, cancel))
        except MonitorUnreachable as err:
            if not err.nobody_listens:
                raise
            if decided == "fail" or (decided == "backup" and not _has_images(vm)):
                if isinstance(vm.access, QmpAccess) and not vm.images:
                    err.hint = f"{err.hint}; {_HOW_TO_BACK_UP}"
                raise
            why = err.message
    if decided == "skip":
        raise VmIsOff(f"{vm.name} is off ({why}), so it was skipped", state=UNTOUCHED)
    return held.enter_context(_open_images(vm, f"{vm.name} is off ({why})", timeouts, cancel))


def _connect(
    vm: VmConfig, access: QmpAccess | LibvirtAccess, timeouts: Timeouts, cancel: Cancellation | None
) -> AbstractContextManager[Driver]:
    if isinstance(access, LibvirtAccess):
        if libvirt_uri.is_remote(access.uri):
            from backupctl.vm.remote import libvirt_driver  # noqa: PLC0415 - see above

            return libvirt_driver.connect(vm, access, timeouts, cancel)
        from backupctl.vm.libvirt import driver as libvirt  # noqa: PLC0415 - see above

        return libvirt.connect(vm, access, timeouts, cancel)
    if access.qmp.remote:
        from backupctl.vm.remote import driver as remote  # noqa: PLC0415 - see above

        return remote.connect(vm, access, timeouts, cancel)
    return qmp.connect(vm, access, timeouts, cancel)


def _open_images(
    vm: VmConfig, why_off: str, timeouts: Timeouts, cancel: Cancellation | None
) -> AbstractContextManager[Driver]:
    if is_remote(vm):
        from backupctl.vm.remote import off_driver as remote  # noqa: PLC0415 - see above

        if isinstance(vm.access, LibvirtAccess):
            return remote.connect_domain(vm, vm.access, why_off, timeouts, cancel)
        return remote.connect(vm, why_off, timeouts, cancel)
    if isinstance(vm.access, LibvirtAccess):
        from backupctl.vm.libvirt import off_driver  # noqa: PLC0415 - see above

        return off_driver.connect(vm, vm.access, why_off, timeouts, cancel)
    from backupctl.vm.offline import driver as offline  # noqa: PLC0415 - see above

    return offline.connect(vm, why_off, timeouts, cancel)


def is_remote(vm: VmConfig) -> bool:
    """Whether the VM, or its images, are on another host: the scratch directory is there then."""
    access = vm.access
    if isinstance(access, LibvirtAccess):
        return libvirt_uri.is_remote(access.uri)
    if isinstance(access, QmpAccess):
        return access.qmp.remote
    return any(one.host is not None for one in vm.images)


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
    access = vm.access
    if isinstance(access, LibvirtAccess):
        if libvirt_uri.is_remote(access.uri):
            from backupctl.vm.remote import libvirt_host  # noqa: PLC0415 - see above

            return libvirt_host.freeze_status(access, timeouts)
        from backupctl.vm.libvirt.agent import LibvirtAgent  # noqa: PLC0415 - see above

        with LibvirtAgent.connect(access.uri, access.domain, timeouts.agent_seconds) as talk:
            return talk.freeze_status()
    assert isinstance(access, QmpAccess)
    assert access.agent is not None
    if access.qmp.remote:
        from backupctl.vm.remote import host  # noqa: PLC0415 - see above

        return host.freeze_status(access, timeouts)
    with agent.Agent.connect(access.agent, timeouts.agent_seconds) as connection:
        return connection.freeze_status()


def thaw_if_frozen(vm: VmConfig, timeouts: Timeouts) -> bool:
    """Thaw a guest that is frozen; whether it was. Raises AgentError.

    Needs no open driver: a guest must not wait for a monitor that somebody else holds.
    """
    access = vm.access
    if isinstance(access, LibvirtAccess):
        if libvirt_uri.is_remote(access.uri):
            from backupctl.vm.remote import libvirt_host  # noqa: PLC0415 - see above

            return libvirt_host.thaw_if_frozen(access, timeouts)
        from backupctl.vm.libvirt import agent as libvirt_agent  # noqa: PLC0415 - see above

        return libvirt_agent.thaw_if_frozen(access.uri, access.domain, timeouts.agent_seconds)
    if access.agent is None:
        return False
    if access.qmp.remote:
        from backupctl.vm.remote import host  # noqa: PLC0415 - see above

        return host.thaw_if_frozen(access, timeouts)
    return agent.thaw_if_frozen(access.agent, timeouts.agent_seconds)


def domains(where: str, timeouts: Timeouts) -> list[tuple[str, bool]]:
    """Return the names of a libvirt's domains, and whether each runs. where: its URI. Raises MonitorError."""
    if libvirt_uri.is_remote(where):
        from backupctl.vm.remote import libvirt_host  # noqa: PLC0415 - see above

        return libvirt_host.domains(where, timeouts)
    from backupctl.vm.libvirt.connection import domain_names  # noqa: PLC0415 - see above

    return domain_names(where, timeouts.command_seconds)
