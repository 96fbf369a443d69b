# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, interrupted at its nth step: `python -m tests.killed incremental web …`.

A step is a monitor command, a request to the guard (it speaks to the agent), or a durable step of the
repository. KILL_AT: which one (from 0); KILL_WHEN: before or after it. STEPS: a file to which each step's
name is written. What happens there is SIGKILL of the run; DEED names an end of the VM in its place: of the
simulator (quit, crash, restart), whose control socket is CONTROL, or of the QEMU with the process id VM_PID
(quit, crash).
"""

import itertools
import json
import os
import select
import signal
import socket
from collections.abc import Mapping
from functools import wraps

from backupctl.cli.main import main
from backupctl.repository import durable, images
from backupctl.vm.guard import Guard
from backupctl.vm.monitor import Monitor

WATCHED = {
    Monitor: ("execute", "send_fd"),
    Guard: ("freeze", "thaw", "hold", "release", "ping_agent"),
    durable: ("sync_file", "sync_folder", "make_folder", "write_new", "replace", "rename"),
    images: ("create_layer",),
}


def interrupt(environment: Mapping[str, str]) -> None:
    """Have it happen, once, in this process."""
    numbers = itertools.count()
    for owner, names in WATCHED.items():
        for name in names:
            _watch(owner, name, numbers, environment)


def _watch(owner: object, name: str, numbers: "itertools.count[int]", environment: Mapping[str, str]) -> None:
    real = getattr(owner, name)
    wanted, when = int(environment.get("KILL_AT", "-1")), environment.get("KILL_WHEN", "before")
    steps = environment.get("STEPS")

    @wraps(real)
    def stepped(*arguments, **options):
        mine = next(numbers)
        if steps:
            with open(steps, "a") as log:
                first = arguments[1] if owner is Monitor and name == "execute" else ""
                log.write(f"{name} {first}\n")
        if mine == wanted and when == "before":
            _happen(environment)
        try:
            return real(*arguments, **options)
        finally:
            if mine == wanted and when == "after":
                _happen(environment)

    setattr(owner, name, stepped)


def _happen(environment: Mapping[str, str]) -> None:
    how = environment.get("DEED", "")
    if not how:
        os.kill(os.getpid(), signal.SIGKILL)
    if "VM_PID" in environment:
        _end(int(environment["VM_PID"]), signal.SIGKILL if how == "crash" else signal.SIGTERM)
        return
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(20)
        control.connect(environment["CONTROL"])
        control.sendall(json.dumps({"do": "end", "how": how}).encode() + b"\n")
        control.recv(1000)


def _end(pid: int, number: signal.Signals) -> None:
    """Have a QEMU end, and wait until it has."""
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, number)
    assert select.select([handle], [], [], 20)[0], "QEMU did not end"
    os.close(handle)


if __name__ == "__main__":
    interrupt(os.environ)
    main()
