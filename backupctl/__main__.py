# SPDX-License-Identifier: GPL-2.0-or-later
"""The program: `backupctl`, or `python -m backupctl`. It starts and ends without what it does not need."""

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

_FEW_COLLECTIONS = 200_000


def main() -> NoReturn:
    """Run the command line, and end the process as soon as it has ended."""
    # While it is loaded, numpy's OpenBLAS starts a thread for each processor, which nothing here needs.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Loading makes some 60,000 objects and no garbage: by default they would be looked through many times.
    gc.set_threshold(_FEW_COLLECTIONS)
    from backupctl.cli.main import main as command_line  # noqa: PLC0415 - as above

    try:
        command_line()
    except SystemExit as err:
        if isinstance(err.code, int):
            _leave(err.code)
        raise


def _leave(code: int) -> NoReturn:
    """End without taking the interpreter apart, which takes as long as a short command."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the command line has brought out all that matters
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
