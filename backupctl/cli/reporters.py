# SPDX-License-Identifier: GPL-2.0-or-later
"""Which Reporter fits stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from backupctl.cli.output import LineReporter, WarningReporter
from backupctl.progress import Reporter


@contextmanager
def reporter(*, quiet: bool = False) -> Iterator[Reporter]:
    """Give the Reporter that fits stderr."""
    if quiet:
        yield WarningReporter()
        return
    if not sys.stderr.isatty():
        yield LineReporter()
        return
    from backupctl.cli import progress_bar  # noqa: PLC0415 - rich takes a tenth of a run's start; timers need none of it

    with progress_bar.reporter() as reporter:
        yield reporter
