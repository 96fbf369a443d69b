# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of one run that QEMU opens by their names: scratch files, and the socket of the export.

::

    backupctl-REPOSITORY-VM@…/    ours; QEMU's group may pass through
      vda.qcow2                   QEMU's; what the guest overwrites during the run
      nbd/                        QEMU's, and nobody else may enter
        s                         the socket, which QEMU makes

QEMU runs as a user of its own, whom libvirt names. A QEMU that its guest has taken over can do no more in
here than harm its own backup: what is ours it cannot write to, and what is opened in its directory is a
socket that must be served by its own user.
"""

import os
import socket
import stat
import struct
from pathlib import Path

from backupctl.errors import UNTOUCHED, Failed, Refused
from backupctl.names import Namespace, NodeName, VmName
from backupctl.vm import scratch_directory
from backupctl.vm.qmp.scratch import Scratch, ScratchFiles

QemuUser = tuple[int, int]
SOCKET = "nbd/s"
_SOCKET_BYTES = 107
_RANDOM = "xxxxxxxx"
_CREDENTIALS = struct.Struct("3i")


def check(directory: Path, namespace_prefix: str, qemu_user: QemuUser | None) -> None:
    """Refuse a scratch directory that QEMU's user cannot reach, or whose path is too long. Raises Refused."""
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


def _may_enter(found: os.stat_result, qemu_user: QemuUser) -> bool:
    if found.st_uid == qemu_user[0]:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid == qemu_user[1]:
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)


class RunFiles:
    """The files of one run; recovery removes them. qemu_user: of QEMU; None if it is ours too."""

    def __init__(self, namespace: Namespace, vm: VmName, directory: Path, qemu_user: QemuUser | None) -> None:
        self._qemu_user = qemu_user if os.geteuid() == 0 else None
        self.directory = scratch_directory.make_private(namespace, vm, directory).absolute()
        self._scratch = ScratchFiles(None, directory, self.directory)
        self.socket = self.directory / SOCKET
        try:
            self.socket.parent.mkdir(0o700)
            if self._qemu_user is not None:
                os.chown(self.directory, -1, self._qemu_user[1])
                self.directory.chmod(0o710)
                os.chown(self.socket.parent, *self._qemu_user)
        except OSError as err:
            raise Failed(f"cannot use the scratch directory {directory}: {err.strerror}") from err

    def scratch(self, target: str) -> Path:
        """Return where the scratch file of a disk is."""
        return self.directory / f"{target}.qcow2"

    def make_scratch(self, target: str, size: int, reserve_bytes: int) -> Scratch:
        """Make a disk's scratch file, an empty qcow2 whose space is allocated. Raises Failed."""
        made = self._scratch.make(NodeName(target), size, reserve_bytes)
        if self._qemu_user is not None:
            try:
                os.fchown(made.descriptor, *self._qemu_user)
            except OSError as err:
                raise Failed(f"cannot give the scratch file {made.filename} to QEMU: {err.strerror}") from err
        return made

    def connect(self) -> socket.socket:
        """Connect to the export. Raises Failed."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(5.0)
            made.connect(str(self.socket))
            made.settimeout(None)
            credentials = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError as err:
            made.close()
            raise Failed(f"cannot connect to QEMU's NBD server: {err.strerror or err}") from err
        _, user, _ = _CREDENTIALS.unpack(credentials)
        if self._qemu_user is not None and user not in (0, self._qemu_user[0]):
            made.close()
            raise Failed(f"the socket {self.socket} is not QEMU's: user {user} serves it")
        return made

    def check(self) -> None:
        """Raise Failed when space that could not be reserved becomes scarce."""
        self._scratch.check()

    def close(self) -> None:
        """Close our descriptors. Never raises."""
        self._scratch.close()
