# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may open an image: owner, mode, ACL and labels, copied from the file that is replaced.

A VM's QEMU runs as a user of its own, confined by labels. It must be able to open the image that replaces
another, and nobody else may gain access.
"""

import os
import stat
from collections.abc import Collection
from contextlib import suppress

_ACLS = ("system.posix_acl_access", "system.nfs4_acl")
_OF_THE_CONTENT = ("security.capability", "security.evm", "security.ima")


def keep(old: int, new: int) -> tuple[str, ...]:
    """Copy owner, group, mode, ACL and labels of an open file to another; returns what could not be set."""
    lost = _owner(old, new)
    mode = stat.S_IMODE(os.fstat(old).st_mode) & 0o777
    same_group = os.fstat(old).st_gid == os.fstat(new).st_gid
    if not same_group:
        mode &= ~0o070  # the old group's rights are not for another group
    lost += _attributes(old, new, _ACLS if same_group else ())
    try:
        os.fchmod(new, mode)
    except OSError as err:
        lost.append(f"mode {mode:o} ({err.strerror})")
    return tuple(lost)


def _owner(old: int, new: int) -> list[str]:
    found, given = os.fstat(old), os.fstat(new)
    lost = []
    for what, uid, gid, same in (
        ("group", -1, found.st_gid, found.st_gid == given.st_gid),
        ("owner", found.st_uid, -1, found.st_uid == given.st_uid),
    ):
        try:
            if not same:
                os.fchown(new, uid, gid)
        except OSError as err:
            lost.append(f"{what} {max(uid, gid)} ({err.strerror})")
    return lost


def _attributes(old: int, new: int, acls: Collection[str]) -> list[str]:
    wanted, given = _read(old, acls), _read(new, acls)
    lost = []
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) == given.get(name):
            continue
        try:
            if name in wanted:
                os.setxattr(new, name, wanted[name])
            elif name in acls:
                os.removexattr(new, name)  # inherited from the directory
        except OSError as err:
            lost.append(f"{name} ({err.strerror})")
    return lost


def _read(descriptor: int, acls: Collection[str]) -> dict[str, bytes]:
    """Return the ACLs and labels of an open file."""
    found: dict[str, bytes] = {}
    with suppress(OSError):  # a file system without them
        for name in os.listxattr(descriptor):
            if name in acls or (name.startswith("security.") and name not in _OF_THE_CONTENT):
                with suppress(OSError):
                    found[name] = os.getxattr(descriptor, name)
    return found
