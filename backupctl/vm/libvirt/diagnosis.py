# SPDX-License-Identifier: GPL-2.0-or-later
"""What `doctor` tells of a domain of libvirt."""

from collections.abc import Iterator, Sequence

from backupctl.errors import UNTOUCHED, Refused
from backupctl.finding import Finding
from backupctl.names import PREFIX, bitmap_parts
from backupctl.options import LibvirtAccess, RunOptions
from backupctl.progress import counted
from backupctl.vm.libvirt import checkpoints, domain
from backupctl.vm.libvirt.checkpoints import Checkpoint
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.libvirt.domain import Description
from backupctl.vm.libvirt.run_files import RunHost

OLDEST_LIBVIRT = 7_002_000
"""Since 7.2 all bitmaps of checkpoints record, so that a run is undone by deleting its checkpoint."""


def refuse_libvirt(connection: Connection) -> None:
    """Refuse a libvirt whose checkpoints are of another kind. Raises Refused, MonitorError."""
    version = connection.call("virConnectGetLibVersion", connection.handle.getLibVersion)
    if version < OLDEST_LIBVIRT:
        raise Refused(
            f"libvirt {version // 1000000}.{version // 1000 % 1000} is too old: 7.2 is needed",
            state=UNTOUCHED,
        )


def findings(
    connection: Connection, access: LibvirtAccess, options: RunOptions, version: str, host: RunHost
) -> Iterator[Finding]:
    """Look at libvirt, the domain's settings, and its checkpoints. Raises MonitorError."""
    yield Finding("monitor", "ok", f"QEMU {version} runs the domain {access.domain} of {access.uri}")
    yield from of_libvirt(connection)
    found = domain.describe(connection)
    yield from _persistence(connection)
    yield from _rights(found, options, host)
    yield from _disks(found, version)
    yield from of_checkpoints(checkpoints.listed(connection))


def of_libvirt(connection: Connection) -> Iterator[Finding]:
    """Tell of a libvirt that is refused."""
    try:
        refuse_libvirt(connection)
    except Refused as err:
        yield Finding("libvirt", "bad", err.message)


def _persistence(connection: Connection) -> Iterator[Finding]:
    if not connection.call("virDomainIsPersistent", connection.domain.isPersistent):
        yield Finding(
            "domain",
            "warning",
            "the domain is transient: libvirt forgets its checkpoints when it stops, and the next "
            "incremental reads all disks",
            "virsh define makes it persistent",
        )


def _rights(found: Description, options: RunOptions, host: RunHost) -> Iterator[Finding]:
    directory = options.scratch.directory
    try:
        host.check_run_directory(directory, f"{PREFIX}00000000-x@", found.qemu_user)
    except Refused as err:
        yield Finding("rights", "bad", err.message)
    except OSError as err:
        yield Finding("rights", "bad", f"cannot look at {directory}: {err.strerror}")
    else:
        user = f"user {found.qemu_user[0]}" if found.qemu_user else "the same user as backupctl"
        yield Finding("rights", "ok", f"QEMU runs as {user}, who can reach {directory}")
    if "apparmor" in found.security:
        yield Finding(
            "apparmor",
            "warning",
            f"AppArmor confines this QEMU: it must be allowed to create a socket below {directory}",
            f'add "{directory}/{PREFIX}*/nbd/s rw," to /etc/apparmor.d/local/abstractions/libvirt-qemu',
        )
    if "selinux" in found.security:
        yield Finding(
            "selinux",
            "warning",
            f"SELinux confines this QEMU: it must be allowed to create a socket below {directory}",
            "this was not tested; ausearch -m avc shows what was denied",
        )


def _disks(found: Description, version: str) -> Iterator[Finding]:
    disks = [one for one in found.disks if not one.why_not]
    if erring := [one.target for one in disks if not one.pauses]:
        yield Finding(
            "error policy",
            "warning",
            f"{', '.join(erring)}: error_policy lets the guest's writes fail when a scratch file is full, so "
            "a run needs as much scratch space as the whole disk",
            "error_policy='enospace' pauses the guest instead",
        )
    if version.startswith("7.2.") and (threaded := [one.target for one in disks if one.iothread]):
        yield Finding(
            "iothread",
            "warning",
            f"{', '.join(threaded)}: QEMU {version} aborts when an NBD client leaves a disk on an iothread "
            "before the backup job has ended; the guard of each run prevents that",
            "never kill run and guard together: KillMode=process in a systemd unit",
        )


def of_checkpoints(there: Sequence[Checkpoint]) -> Iterator[Finding]:
    """Tell what our checkpoints mean for the administrator."""
    if ours := [one for one in there if bitmap_parts(one.name)]:
        yield Finding(
            "checkpoints",
            "ok",
            f"{counted(len(ours), 'checkpoint')} of backupctl; `virsh undefine` needs "
            "--checkpoints-metadata, and virtnbdbackup refuses a domain with checkpoints of others",
        )
