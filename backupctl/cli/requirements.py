# SPDX-License-Identifier: GPL-2.0-or-later
"""What backupctl cannot run without, and pip does not install."""

import importlib.util

from backupctl.errors import UNTOUCHED, UsageError


def check() -> None:
    """Raise UsageError if libnbd's module is missing. Call it before any module that imports it is loaded."""
    if importlib.util.find_spec("nbd") is None:
        raise UsageError(
            "libnbd's Python module, `nbd`, is missing; it comes with the distribution, not with pip",
            state=UNTOUCHED,
            hint="a virtual environment sees it only if /usr/bin/python3 made it with --system-site-packages",
            next_command="apt install python3-libnbd",
        )
