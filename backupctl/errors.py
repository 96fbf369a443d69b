# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that backupctl raises on purpose, as one tree.

::

    BackupctlError                      exit code
     ├─ UsageError                      2   the command line or the configuration is wrong
     ├─ Locked                          75  another run works on this VM
     ├─ DamageFound                     4   stored data is not what was written
     ├─ NeedsRecovery                   3   failed, and something of ours is still in the VM
     └─ Failed                          1   failed, nothing lost, nothing left behind
         ├─ Interrupted                     SIGINT or SIGTERM
         ├─ Refused                         preflight: going on could harm the guest or the chain
         │   └─ ViewUnavailable             snapshot-access can't be had here; fleecing can
         ├─ MonitorError
         │   ├─ MonitorUnreachable          no greeting: nothing was sent
         │   ├─ CommandFailed               QEMU answered with an error: nothing took effect
         │   └─ OutcomeUnknown              no answer: QEMU must be asked what is the case
         ├─ AgentError
         │   ├─ AgentUnavailable            no agent answers
         │   ├─ AgentRefused                the agent answered with an error
         │   └─ AgentTimeout                the agent took a command and is silent
         ├─ FreezeOverrun                   the guest was thawed before the moment was taken
         ├─ GuardLost                       the process that stands by to thaw has died
         ├─ TransferError
         │   ├─ ReadFailed                  the point-in-time view can't be read
         │   └─ WriteFailed                 the repository's image can't be written
         └─ RepositoryError
             ├─ NotARepository
             ├─ RepositoryUnreadable        what is stored can't be looked at, so nothing is known of it
             ├─ UnknownFormat               made by a newer backupctl
             ├─ InvalidName                 a name that could leave the repository's folder
             ├─ NoSuchPoint
             └─ TargetExists                restore never overwrites unless told to

Each carries what the person at three in the morning needs: what failed (the message), at which step,
what state things are in now, and the one command to run next. The layer that raises fills in what it
knows; the layers above add the rest with `BackupctlError.add`. The command line adds to that command the
options that it was given itself (`cli/next_command.py`), so it runs as it stands.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self


class BackupctlError(Exception):
    """Base of the tree.

    message: what failed, one sentence, naming VM and disk where they are known.
    step: the protocol step under way, or "".
    state: what is the case now, one sentence, or "".
    hint: what to do that is no command, or why, or "".
    next_command: the one command to run next, as it is typed, or "".
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, step: str = "", state: str = "", hint: str = "", next_command: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.step = step
        self.state = state
        self.hint = hint
        self.next_command = next_command

    def __str__(self) -> str:
        return self.message  # to which a layer above may have added

    def add(self, *, step: str = "", state: str = "", hint: str = "", next_command: str = "") -> Self:
        """Fill in what is still empty; what a lower layer said stands."""
        self.step = self.step or step
        self.state = self.state or state
        self.hint = self.hint or hint
        self.next_command = self.next_command or next_command
        return self


class UsageError(BackupctlError):
    """The command line or the configuration is wrong; nothing was touched."""

    exit_code = 2


class Locked(BackupctlError):
    """Another run holds the VM's lock."""

    exit_code = 75


class DamageFound(BackupctlError):
    """What is stored is not what was written: bytes said so, or a file that a manifest names is not there.

    A file that can't be read says nothing: see `RepositoryUnreadable`.
    """

    exit_code = 4


class NeedsRecovery(BackupctlError):
    """The run failed and something of ours is still in the VM: `backupctl recover` is needed."""

    exit_code = 3


class Failed(BackupctlError):
    """The run failed; nothing is lost and nothing of ours is left behind."""


class Interrupted(Failed):
    """SIGINT or SIGTERM asked the run to end."""


class Refused(Failed):
    """Preflight found that going on could harm the guest or break the chain; nothing was touched."""


class ViewUnavailable(Refused):
    """The view that was asked for can't be had of this VM; the other one can."""


class MonitorError(Failed):
    """Something is wrong between us and QEMU's monitor."""


class MonitorUnreachable(MonitorError):
    """No monitor answers at that address; no command was sent."""


class CommandFailed(MonitorError):
    """QEMU answered a command with an error, so the command took no effect.

    command: the QMP command. error_class: QMP's error class. description: QEMU's own text.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class OutcomeUnknown(MonitorError):
    """A command was sent and no answer came: only QEMU knows whether it took effect.

    command: the QMP command.
    """

    def __init__(self, command: str, why: str) -> None:
        super().__init__(f"no answer to {command}: {why}")
        self.command = command


class AgentError(Failed):
    """Something is wrong between us and the guest agent."""


class AgentUnavailable(AgentError):
    """No guest agent answers."""


class AgentRefused(AgentError):
    """The guest agent answered a command with an error, or had nothing to freeze."""


class AgentTimeout(AgentError):
    """The guest agent took a command and did not answer in time: its outcome is unknown."""


class FreezeOverrun(Failed):
    """The guest was thawed, or may have been, before the moment was taken: by the guard, or in the guest."""


class GuardLost(Failed):
    """The guard process died or hung: nobody stands by any more to thaw the guest if the run dies."""


class TransferError(Failed):
    """Bytes could not be moved."""


class ReadFailed(TransferError):
    """The point-in-time view can't be read; no byte of it may be guessed."""


class WriteFailed(TransferError):
    """The image in the repository can't be written."""


@contextmanager
def moving(source: str, target: str) -> Iterator[None]:
    """Name in a TransferError of the block what could not be read or written, unless it does so itself."""
    try:
        yield
    except TransferError as err:
        which, cant = (target, "written") if isinstance(err, WriteFailed) else (source, "read")
        if not re.search(rf"\b{re.escape(which)}\b", err.message):
            err.message = f"{which} can't be {cant}: {err.message}"
        raise


class RepositoryError(Failed):
    """Something is wrong with the repository."""


class NotARepository(RepositoryError):
    """The folder holds no repository of ours."""


class RepositoryUnreadable(RepositoryError):
    """The operating system did not let us read what is stored; whether it is damaged is not known."""


class UnknownFormat(RepositoryError):
    """The format version is not one that this backupctl knows."""


class InvalidName(RepositoryError):
    """A name from outside that must not become part of a path."""

    exit_code = 2


class NoSuchPoint(RepositoryError):
    """No recovery point of that id, or none at all."""

    exit_code = 2


class TargetExists(RepositoryError):
    """Something already stands where a restore would write."""

    exit_code = 2
