# SPDX-License-Identifier: GPL-2.0-or-later
"""What backupctl can't even be loaded without, told in words. To be imported before all that needs it."""

import importlib.util
import sys

if importlib.util.find_spec("nbd") is None:
    sys.stderr.write(
        "backupctl: libnbd's Python module, `nbd`, is missing; the distribution has it, pip has not\n"
        "  state: nothing was touched\n"
        "  next:  apt install python3-libnbd; a virtual environment sees it if it was made by\n"
        "         /usr/bin/python3 -m venv --system-site-packages\n"
    )
    sys.exit(2)
