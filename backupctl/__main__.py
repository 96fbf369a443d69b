# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m backupctl`."""

from backupctl.cli.main import main

main()
