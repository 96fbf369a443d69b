# SPDX-License-Identifier: GPL-2.0-or-later
"""On libvirt's machine: the directory of one run's files, made for QEMU's user, and the socket in it.

::

    backupctl-REPOSITORY-VM@…/    ours; QEMU's group may pass through
      vda.qcow2                   QEMU's; what the guest overwrites during the run
      nbd/                        QEMU's, and nobody else may enter
        s                         the socket, which QEMU makes

QEMU runs as a user of its own, whom libvirt names. A QEMU that its guest has taken over can do no more in
here than harm its own backup: what is ours it cannot write to, and what is opened in its directory is a
socket that must be served by its own user.

A run on another host does this there (`vm/remote/program.py`), so this imports only what loads quickly.
"""

import os
import socket
import stat
import struct
from pathlib import Path

from backupctl.errors import UNTOUCHED, Failed, Refused
from backupctl.names import Namespace, VmName
from backupctl.vm import scratch_directory

QemuUser = tuple[int, int]
"""User and group of a QEMU."""
SOCKET = "nbd/s"
HEADER_BYTES = 80
_SOCKET_BYTES = 107
_RANDOM = "xxxxxxxx"
_CREDENTIALS = struct.Struct("3i")
_CONNECT_SECONDS = 5.0


def check(directory: Path, namespace_prefix: str, qemu_user: QemuUser | None) -> None:
    """Refuse a scratch directory that QEMU's user cannot reach, or whose path is too long.

    Raises Refused, OSError if it cannot be looked at.
    """
    path = f"{directory.absolute()}/{namespace_prefix}{_RANDOM}/{SOCKET}"
    if len(os.fsencode(path)) > _SOCKET_BYTES:
        raise Refused(
            f"the path {path} is too long for a socket: {_SOCKET_BYTES} bytes at most; "
            "use another scratch directory, or a shorter name for the VM",
            state=UNTOUCHED,
        )
    if qemu_user is None or qemu_user[0] == 0:
        return
    if os.geteuid() not in (0, qemu_user[0]):
        raise Refused(
            f"QEMU runs as user {qemu_user[0]}, to whom only root can give scratch files", state=UNTOUCHED
        )
    for each in (directory.absolute(), *directory.absolute().parents):
        if not _may_enter(each.stat(), qemu_user):
            raise Refused(
                f"QEMU runs as user {qemu_user[0]}, who may not enter {each}; "
                "use another scratch directory, such as /var/tmp",
                state=UNTOUCHED,
            )


def make(namespace: Namespace, vm: VmName, directory: Path, qemu_user: QemuUser | None) -> Path:
    """Make the directory of a run; recovery removes it. Raises Refused, Failed."""
    made = scratch_directory.make_private(namespace, vm, directory).absolute()
    socket_directory = (made / SOCKET).parent
    try:
        socket_directory.mkdir(0o700)
        if (user := _other(qemu_user)) is not None:
            os.chown(made, -1, user[1])
            made.chmod(0o710)
            os.chown(socket_directory, *user)
    except OSError as err:
        raise Failed(f"cannot use the scratch directory {directory}: {err.strerror}") from err
    return made


def give(descriptor: int, qemu_user: QemuUser | None) -> None:
    """Give a scratch file to QEMU's user. Raises Failed."""
    if (user := _other(qemu_user)) is not None:
        try:
            os.fchown(descriptor, *user)
        except OSError as err:
            raise Failed(f"cannot give a scratch file to QEMU: {err.strerror}") from err


def connect(path: Path, qemu_user: QemuUser | None) -> socket.socket:
    """Connect to the export; the peer must be QEMU. Raises Failed."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(_CONNECT_SECONDS)
        made.connect(str(path))
        made.settimeout(None)
        credentials = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError as err:
        made.close()
        raise Failed(f"cannot connect to QEMU's NBD server: {err.strerror or err}") from err
    _, peer, _ = _CREDENTIALS.unpack(credentials)
    user = _other(qemu_user)
    if user is not None and peer not in (0, user[0]):
        made.close()
        raise Failed(f"the socket {path} is not QEMU's: user {peer} serves it")
    return made


def header(path: str) -> bytes:
    """Return the first bytes of an image; none if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return b""
    try:
        return os.pread(descriptor, HEADER_BYTES, 0)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _other(qemu_user: QemuUser | None) -> QemuUser | None:
    """Return QEMU's user if files must be given to it: only root can."""
    return qemu_user if os.geteuid() == 0 else None


def _may_enter(found: os.stat_result, qemu_user: QemuUser) -> bool:
    if found.st_uid == qemu_user[0]:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid == qemu_user[1]:
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)
