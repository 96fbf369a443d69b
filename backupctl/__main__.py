# SPDX-License-Identifier: GPL-2.0-or-later
"""The program: `backupctl`, or `python -m backupctl`. It starts and ends without what it does not need."""

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn

import backupctl

_FEW_COLLECTIONS = 200_000


def main() -> NoReturn:
    """Run the command line, and end the process as soon as it has ended."""
    if sys.argv[1:] in (["--version"], ["-V"]):  # to load the command line takes ten times as long
        _leave(_print_version())
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


def _print_version() -> int:
    try:
        sys.stdout.write(f"backupctl, version {backupctl.__version__}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as err:
        sys.stderr.write(f"backupctl: cannot write to standard output: {err.strerror}\n")
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """End without taking the interpreter apart, which takes as long as a short command."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the command line has brought out all that matters
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
