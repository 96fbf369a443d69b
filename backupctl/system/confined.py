# SPDX-License-Identifier: GPL-2.0-or-later
"""A child with as few rights as it can have: for a program that runs what a guest stored.

As root the child becomes an unprivileged user without groups, in network, IPC and host name namespaces of
its own where the kernel allows it. It can gain no rights, is limited in what it writes, and is killed when
its parent ends, by whatever cause. Sources: prctl(2), unshare(2), credentials(7).
"""

import ctypes
import os
import pwd
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWNET = 0x04000000, 0x08000000, 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_USER = "nobody"
_KVM = Path("/dev/kvm")
_MOST_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Rights:
    """Who a child runs as. None: as we do, who are not root. groups: those that it needs besides."""

    user: int | None
    group: int | None
    groups: tuple[int, ...] = ()


def rights_for_kvm() -> Rights:
    """Return the rights of a child that may use KVM, where members of a group may, and nothing else."""
    if os.geteuid() != 0:
        return Rights(None, None)
    found = pwd.getpwnam(_USER)
    groups: tuple[int, ...] = ()
    with suppress(OSError):
        group = _KVM.stat().st_gid
        groups = (group,) if group else ()  # never that of root
    return Rights(found.pw_uid, found.pw_gid, groups)


def prepared(rights: Rights) -> Callable[[], None]:
    """Return what a child is to call before it executes a program (`preexec_fn`).

    The parent's end is that of the thread that started the child, so only the main thread may start one.
    What the child raises is raised by Popen.
    """
    parent = os.getpid()

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_FILE_BYTES, _MOST_FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if rights.user is not None and rights.group is not None:
            # Not everywhere allowed, e.g. in a container; the user below is what counts.
            _LIBC.unshare(_CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS)
            os.setgroups(rights.groups)
            os.setresgid(rights.group, rights.group, rights.group)
            os.setresuid(rights.user, rights.user, rights.user)
        if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "cannot give up the right to gain rights")
        # After the change of user, which clears it.
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call, which then has no effect
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare
