# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, interrupted at its nth step: `Cli.call(…, entry=ENTRY, KILL_AT="5")`.

A step is a monitor command or a call of libvirt, a request to the guard (which speaks to the agent), an agent
command of the run itself, or a durable step of the repository. KILL_AT: its number, from 0, or the name of a
monitor command, of libvirt's function or of a request to the guard, for each call of it. KILL_WHEN: before or
after it. STEPS: a file to which the name of each step is written.
The interruption is SIGKILL of the run, or ACTION:

- term: SIGTERM of the run;
- eio, enospc: a durable step fails, once, or this one and all that follow;
- hangup, lost: the monitor connection is closed at the next command, before or after QEMU runs it;
- cut: the ssh connection to the VM's host breaks: the sessions of the sshd with the process id SSHD_PID end;
- unplugged: the same at this end: the run's own ssh processes are killed;
- silence: nothing passes that connection any more, and nobody says so: those sessions are stopped;
- quit, crash, restart: the VM ends: the QEMU with the process id VM_PID (no restart), or the simulator.
  VM_PID may be libvirtd's, too;
- terminate: the process VM_PID gets a SIGTERM, and nobody waits until it has ended: a libvirtd that waits for
  its QEMU, which waits for the run's NBD clients, ends only if the run goes on;
- stop: the process VM_PID is stopped, as if it hung.

CONTROL is the simulator's control socket. Its guest then writes before each export is added, so that the new
bitmap has dirty bits that a bug could lose.
"""

import errno
import itertools
import json
import os
import re
import select
import signal
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path

from backupctl.cli.main import main
from backupctl.images import create
from backupctl.system import durable
from backupctl.vm.guest.agent import Agent
from backupctl.vm.guest.guard import GuardClient
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.remote.guard import RemoteGuard
from fixtures import sshd

ENTRY = "tests.interrupted_cli:interrupted"
WATCHED = {
    Monitor: ("execute", "send_fd"),
    Connection: ("call",),
    GuardClient: ("freeze", "thaw", "hold", "ready", "release", "ping_agent", "watch", "unwatch"),
    RemoteGuard: ("hold",),
    Agent: ("freeze_status", "thaw"),
    durable: (
        "sync_file",
        "sync_directory",
        "make_directory",
        "write_new",
        "append",
        "replace",
        "rename",
    ),
    create: ("create_layer",),
}
ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}
BUG = re.compile(r"\b[A-Z]\w*(Error|Exception)\b|in backupctl itself")
"""The name of an exception's class in a message shows a bug: our own errors never print theirs."""


def interrupt(environment: Mapping[str, str]) -> None:
    """Set up the interruption in this process."""
    numbers, told = itertools.count(), threading.Lock()
    for owner, names in WATCHED.items():
        for name in names:
            _watch(owner, name, numbers, told, environment)


def _watch(
    owner: object,
    name: str,
    numbers: "itertools.count[int]",
    told: threading.Lock,
    environment: Mapping[str, str],
) -> None:
    real = getattr(owner, name)
    at, when = environment.get("KILL_AT", "-1"), environment.get("KILL_WHEN", "before")
    wanted = int(at) if at.isdecimal() else -1
    steps = environment.get("STEPS")
    error = ERRORS.get(environment.get("ACTION", ""), 0) if owner is durable else 0

    @wraps(real)
    def stepped(*arguments, **options):
        commands = (owner, name) in ((Monitor, "execute"), (Connection, "call"))
        first = arguments[1] if commands else name if owner in (GuardClient, RemoteGuard) else ""
        with told:  # disks are copied by several threads, and the nth line is that of the nth step
            mine = next(numbers)
            if steps:
                with open(steps, "a") as log:
                    log.write(f"{name} {first if commands else ''}\n")
        hit = at in (str(mine), first)
        grows = name != "append" or arguments[-1] != b""
        full = error == errno.ENOSPC and mine > wanted >= 0 and grows
        if error and (mine == wanted or full):
            raise OSError(error, os.strerror(error))
        if "CONTROL" in environment and owner is Monitor and "block-export-add" in arguments:
            with suppress(OSError):  # it may have ended
                _order(environment, {"do": "step", "count": 2})
        if hit and when == "before":
            _interrupt_now(environment)
        try:
            return real(*arguments, **options)
        finally:
            if hit and when == "after":
                _interrupt_now(environment)

    setattr(owner, name, stepped)


def _interrupt_now(environment: Mapping[str, str]) -> None:
    how = environment.get("ACTION", "")
    if how in ERRORS:
        return
    if how in ("", "term"):
        os.kill(os.getpid(), signal.SIGTERM if how else signal.SIGKILL)
        return
    if how in ("cut", "silence"):
        number = signal.SIGKILL if how == "cut" else signal.SIGSTOP
        sshd.end_sessions(int(environment["SSHD_PID"]), number)
        return
    if how == "unplugged":
        _kill_own_ssh()
        return
    if how in ("stop", "terminate"):
        os.kill(int(environment["VM_PID"]), signal.SIGSTOP if how == "stop" else signal.SIGTERM)
        return
    if "VM_PID" in environment:
        _end(int(environment["VM_PID"]), signal.SIGKILL if how == "crash" else signal.SIGTERM)
        return
    fault = how in ("hangup", "lost")
    _order(environment, {"do": "fault", "spec": f"qmp:*={how}"} if fault else {"do": "end", "how": how})


def _kill_own_ssh() -> None:
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    for child in itertools.chain.from_iterable(children):
        with suppress(OSError):  # it may have ended
            if Path(f"/proc/{child}/comm").read_text().strip() == "ssh":
                os.kill(int(child), signal.SIGKILL)


def _order(environment: Mapping[str, str], order: dict[str, object]) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(60)
        control.connect(environment["CONTROL"])
        control.sendall(json.dumps(order).encode() + b"\n")
        control.recv(1000)


def _end(pid: int, number: signal.Signals) -> None:
    """End a QEMU with a signal, and wait until it has ended."""
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, number)
    assert select.select([handle], [], [], 20)[0], "QEMU did not end"
    os.close(handle)


def interrupted() -> None:
    """Run the command line with the interruption that the environment describes."""
    interrupt(os.environ)
    main()
