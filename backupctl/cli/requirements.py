# SPDX-License-Identifier: GPL-2.0-or-later
"""What backupctl can't even be loaded without, told in words. To be imported before all that needs it."""

import importlib.util
import sys

from backupctl.cli import output
from backupctl.errors import UsageError

if importlib.util.find_spec("nbd") is None:
    missing = UsageError(
        "libnbd's Python module, `nbd`, is missing; the distribution has it, pip has not",
        state="nothing was touched",
        hint="a virtual environment made by /usr/bin/python3 -m venv --system-site-packages sees it",
        next_command="apt install python3-libnbd",
    )
    output.print_error(missing, as_json="--json" in sys.argv)
    sys.exit(missing.exit_code)
