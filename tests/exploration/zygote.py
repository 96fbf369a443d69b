# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of the command line in children of one process that has imported it all: that takes most of a call.

A request is a JSON line: arguments, environment (see tests.killed), out (a file for its stdout) and words
(one for its stderr). The answer is its exit code, negative for a signal.
"""

import json
import os
import sys
from typing import Any

from backupctl.cli import (  # noqa: F401 - imported before there are children
    main,
    prune,
    restore,
    run,
    verify,
    vm,
)
from tests import killed


def call(request: dict[str, Any]) -> int:
    """Fork, and be the command line in the child."""
    child = os.fork()
    if child == 0:
        for path, descriptor in ((request["out"], 1), (request["words"], 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["backupctl", *request["arguments"]]
        killed.interrupt(request["environment"])
        code = 70
        try:
            killed.main()
        except SystemExit as err:
            code = int(err.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


for line in sys.stdin:
    print(call(json.loads(line)), flush=True)
