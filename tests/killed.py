# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, killed by SIGKILL at its nth step: `python -m tests.killed incremental web …`.

A step is a monitor command, a request to the guard, or a durable step of the repository. KILL_AT: which one
(from 0); KILL_WHEN: before or after it. STEPS: a file to which each step's name is written.
"""

import itertools
import os
import signal
from functools import wraps

from backupctl.cli.main import main
from backupctl.repository import durable, images
from backupctl.vm.guard import Guard
from backupctl.vm.monitor import Monitor

KILL_AT = int(os.environ.get("KILL_AT", "-1"))
KILL_WHEN = os.environ.get("KILL_WHEN", "before")
STEPS = os.environ.get("STEPS")
numbers = itertools.count()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(owner: object, name: str) -> None:
    real = getattr(owner, name)

    @wraps(real)
    def stepped(*arguments, **options):
        mine = next(numbers)
        if STEPS:
            with open(STEPS, "a") as log:
                first = arguments[1] if owner is Monitor and name == "execute" else ""
                log.write(f"{name} {first}\n")
        if mine == KILL_AT and KILL_WHEN == "before":
            die()
        try:
            return real(*arguments, **options)
        finally:
            if mine == KILL_AT:
                die()

    setattr(owner, name, stepped)


for name in ("execute", "send_fd"):
    watch(Monitor, name)
for name in ("freeze", "thaw", "hold", "release", "ping_agent"):
    watch(Guard, name)
for name in ("sync_file", "sync_folder", "make_folder", "write_new", "replace", "rename"):
    watch(durable, name)
watch(images, "create_layer")
main()
