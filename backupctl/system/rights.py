# SPDX-License-Identifier: GPL-2.0-or-later
"""Which right to a file the user of this process lacks, and how its owner gives it. For messages only."""

import os
import pwd
import shlex
from pathlib import Path


def advice(path: Path, *, writes: bool = False) -> str:
    """Say what is missing to open a file, after the operating system denied it.

    writes: whether it is to be written to as well. The user may be without a right to a directory above it.
    """
    user = _user()
    for directory in reversed(path.parents):
        if not os.access(directory, os.X_OK):
            return f"user {user} may not enter {directory}; its owner may run: {_grant(user, 'x', directory)}"
    verb, rights = ("write to", "rw") if writes else ("read", "r")
    return f"user {user} may not {verb} it; its owner may run: {_grant(user, rights, path)}"


def _grant(user: str, rights: str, path: Path) -> str:
    return f"setfacl -m u:{user}:{rights} {shlex.quote(str(path))}"


def _user() -> str:
    number = os.geteuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a container may have no list of users
        return str(number)
