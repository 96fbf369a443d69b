# SPDX-License-Identifier: GPL-2.0-or-later
"""The backup job of a domain: whose it is, and how it is ended. The guard imports this.

A job stays, whatever becomes of the client that began it, and of libvirtd. Ours is known by the directory of
its socket. It is ended before any NBD client leaves: on an iothread QEMU 7.2 aborts when a client leaves an
export. While it ends its clients are drained: QEMU's main loop, and the guest with it, stands still for as
long as a client does not read (measured on QEMU 7.2.22 and 10.0.2). A client in its handshake leaves before
(see `guest.handshake`).
"""

import time
from collections.abc import Callable

from backupctl.errors import CommandFailed, OutcomeUnknown
from backupctl.vm.libvirt import xml
from backupctl.vm.libvirt.connection import (
    NO_BACKUP_JOB,
    NO_JOB,
    NOT_RUNNING,
    PAUSED,
    PAUSED_BY_IO_ERROR,
    Connection,
)

Drain = Callable[[], object]
IsOurs = Callable[[str], bool]
"""Whether the path of a backup's socket is of ours."""
_PAUSE_SECONDS = 0.02
_ABORT = "virDomainAbortJob"
_WORKED_ON = (1, 2)
"""virDomainControlState: a job, or a command of QEMU's monitor, is under way."""


def socket_of_job(connection: Connection, drain: Drain | None = None) -> str | None:
    """Return the socket of the backup under way, "" if it has none; None without a backup.

    Raises MonitorError, Failed.
    """
    domain = connection.domain
    try:
        document = connection.call("virDomainBackupGetXMLDesc", domain.backupGetXMLDesc, meanwhile=drain)
    except CommandFailed as err:
        if err.error_class in (NO_BACKUP_JOB, NO_JOB, NOT_RUNNING):
            return None
        raise
    return xml.server_socket(document)


def end(connection: Connection, is_ours: IsOurs, drain: Drain, hang_up: Callable[[], object] = bool) -> bool:
    """End the backup if it is ours, and wait until it is gone; whether there was one.

    hang_up: disconnects the clients that are in their handshake, before the NBD server is stopped. A guest
    that a full scratch file has paused is resumed. Raises MonitorError, Failed.
    """
    drain()
    await_quiet(connection, drain)
    if not _is_there(connection, is_ours, drain):
        return False
    hang_up()
    paused = connection.state() == (PAUSED, PAUSED_BY_IO_ERROR)
    try:
        connection.call(_ABORT, connection.domain.abortJob, meanwhile=drain)
    except CommandFailed as err:
        if err.error_class not in (NO_JOB, NOT_RUNNING):
            raise
    deadline = time.monotonic() + connection.seconds
    while _is_there(connection, is_ours, drain):
        if time.monotonic() > deadline:
            raise OutcomeUnknown(_ABORT, "the backup job has not ended yet")
        drain()
        time.sleep(_PAUSE_SECONDS)
    if paused:
        resume(connection)
    return True


def await_quiet(connection: Connection, drain: Drain = bool) -> None:
    """Wait until libvirt works on the domain no more: a backup that is about to begin is not a job yet.

    A virDomainBackupBegin that nobody waits for goes on as soon as QEMU answers
    (``test_a_qemu_that_hangs_while_the_backup_begins_is_given_up_and_found_again``). virDomainGetControlInfo
    itself waits for nothing (``qemuDomainGetControlInfo`` in src/qemu/qemu_driver.c). Raises MonitorError,
    OutcomeUnknown if it still works after the time of one call.
    """
    deadline = time.monotonic() + connection.seconds
    while _is_worked_on(connection, drain):
        if time.monotonic() > deadline:
            raise OutcomeUnknown("virDomainGetControlInfo", "libvirt still waits for QEMU")
        drain()
        time.sleep(_PAUSE_SECONDS)


def _is_worked_on(connection: Connection, drain: Drain) -> bool:
    try:
        state = connection.call("virDomainGetControlInfo", connection.domain.controlInfo, meanwhile=drain)[0]
    except CommandFailed as err:
        if err.error_class in (NO_JOB, NOT_RUNNING):
            return False
        raise
    return bool(state in _WORKED_ON)


def resume(connection: Connection) -> None:
    """Let a guest go on that an I/O error has paused. Raises MonitorError."""
    if connection.state() == (PAUSED, PAUSED_BY_IO_ERROR):
        connection.call("virDomainResume", connection.domain.resume)


def _is_there(connection: Connection, is_ours: IsOurs, drain: Drain) -> bool:
    found = socket_of_job(connection, drain)
    return found is not None and is_ours(found)
