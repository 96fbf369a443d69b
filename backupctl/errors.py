# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that backupctl raises on purpose, as one tree.

::

    BackupctlError                      exit code
     ├─ UsageError                      2   the command line or the configuration is wrong
     ├─ Locked                          75  another run works on this VM
     ├─ DamageFound                     4   stored data is not what was written
     ├─ NeedsRecovery                   3   failed, and objects of ours are still in the VM
     └─ Failed                          1   failed; nothing is lost and nothing is left in the VM
         ├─ Interrupted                     SIGINT or SIGTERM
         ├─ HookFailed                      a command of the configuration failed or took too long
         ├─ Refused                         a preflight check found a danger to the guest or the chain
         │   └─ ViewUnavailable             this VM does not support the view; another view works
         ├─ MonitorError
         │   ├─ MonitorUnreachable          no greeting: nothing was sent
         │   ├─ VmIsOff                     a VM that is shut down is not to be backed up
         │   ├─ CommandFailed               QEMU answered with an error: nothing took effect
         │   └─ OutcomeUnknown              no answer: only QEMU knows whether it took effect
         ├─ AgentError
         │   ├─ AgentUnavailable            no agent answers
         │   ├─ AgentRefused                the agent answered with an error
         │   └─ AgentTimeout                the agent took a command and did not answer
         ├─ FreezeOverrun                   the guest was thawed before the point in time
         ├─ FilesystemError                 a guest's file system is damaged, or not supported
         ├─ RestoreTestFailed               a throw-away VM with the disks of a point did not boot
         ├─ GuardLost                       the process that thaws the guest if the run dies has died
         ├─ TransferError
         │   ├─ ReadFailed                  cannot read the point-in-time view
         │   └─ WriteFailed                 cannot write the image
         └─ RepositoryError
             ├─ NotARepository
             ├─ RepositoryUnreadable        the operating system refused to read what is stored
             ├─ UnknownFormat               written by a newer backupctl
             ├─ InvalidName                 a name that could lead out of the repository
             ├─ NoSuchPoint
             ├─ AmbiguousPoint              the beginning of an id that several points have
             └─ TargetExists                a restore overwrites only with --force

Each error has what an administrator needs: what failed (the message), at which step, what state things
are in now, and the one command to run next. The layer that raises fills in what it knows; the layers
above add the rest with `BackupctlError.add`. The command line adds the options that it was given to that
command (`cli/next_command.py`), so it runs as it stands.

Scripts rely on the exit code and on `code`, which stays as it is when a class is renamed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Self

UNTOUCHED = "nothing was touched"
"""The state after an error that was found before anything was changed."""


class BackupctlError(Exception):
    """Base of the tree.

    message: what failed, one sentence, naming VM and disk where they are known.
    subject: what the sentence is about if it does not say so itself ("cannot write PATH"), or "". Where
        there is one, the message reads "SUBJECT: SENTENCE".
    step: the protocol step under way, or "".
    state: the state that things are in now, one sentence, or "".
    hint: advice that is not a command, or "".
    next_command: the one command to run next, as it is typed, or "".

    code: what programs and scripts know the error by (JSON `error.kind`).
    """

    code: ClassVar[str] = "BackupctlError"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        subject: str = "",
        step: str = "",
        state: str = "",
        hint: str = "",
        next_command: str = "",
    ) -> None:
        super().__init__(message)
        self._sentence = message
        self.subject = subject
        self.step = step
        self.state = state
        self.hint = hint
        self.next_command = next_command

    @property
    def message(self) -> str:
        """What failed, with its subject."""
        return f"{self.subject}: {self._sentence}" if self.subject else self._sentence

    def __str__(self) -> str:
        return self.message

    def add(
        self, *, subject: str = "", step: str = "", state: str = "", hint: str = "", next_command: str = ""
    ) -> Self:
        """Fill in what is still empty; what a lower layer filled in stays."""
        self.subject = self.subject or subject
        self.step = self.step or step
        self.state = self.state or state
        self.hint = self.hint or hint
        self.next_command = self.next_command or next_command
        return self

    def reworded(self, message: str) -> Self:
        """Return an error of the same class that says `message`; state, hint and the rest are the same."""
        made = type(self).__new__(type(self), message)  # not __init__, whose arguments differ by class
        made.__dict__.update(self.__dict__, _sentence=message, subject="")
        return made


class UsageError(BackupctlError):
    """The command line or the configuration is wrong; nothing was touched."""

    code = "UsageError"
    exit_code = 2


class Locked(BackupctlError):
    """Another run holds the VM's lock."""

    code = "Locked"
    exit_code = 75


class DamageFound(BackupctlError):
    """What is stored is not what was written: its bytes differ, or a file that a manifest names is missing.

    A file that cannot be read is not damage: see `RepositoryUnreadable`.
    """

    code = "DamageFound"
    exit_code = 4


class NeedsRecovery(BackupctlError):
    """The run failed and objects of ours are still in the VM: `backupctl recover` is needed."""

    code = "NeedsRecovery"
    exit_code = 3


class Failed(BackupctlError):
    """The run failed; nothing is lost and nothing of ours is left in the VM."""

    code = "Failed"


class Interrupted(Failed):
    """SIGINT or SIGTERM asked the run to end."""

    code = "Interrupted"


class HookFailed(Failed):
    """A command that the configuration names could not be started, failed, or took too long."""

    code = "HookFailed"


class Refused(Failed):
    """A preflight check found a danger to the guest or to the chain; nothing was touched."""

    code = "Refused"


class ViewUnavailable(Refused):
    """The VM does not support the view that was asked for; it supports another one."""

    code = "ViewUnavailable"


class MonitorError(Failed):
    """Something is wrong between us and QEMU's monitor."""

    code = "MonitorError"


class MonitorUnreachable(MonitorError):
    """No monitor answers at that address; no command was sent.

    nobody_listens: the socket does not exist, or refuses connections, so no process has it open. False for a
    monitor that is silent: its VM may run.
    """

    code = "MonitorUnreachable"
    nobody_listens = False


class VmIsOff(MonitorError):
    """The VM is shut down, and the configuration or an option says that it is not backed up then."""

    code = "VmIsOff"


class CommandFailed(MonitorError):
    """QEMU answered a command with an error, so the command took no effect.

    command: the QMP command. error_class: QMP's error class. description: QEMU's own text.
    """

    code = "CommandFailed"

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


class OutcomeUnknown(MonitorError):
    """A command was sent and no answer came: only QEMU knows whether it took effect.

    command: the QMP command.
    """

    code = "OutcomeUnknown"

    def __init__(self, command: str, why: str) -> None:
        super().__init__(f"no answer to {command}: {why}")
        self.command = command


class AgentError(Failed):
    """Something is wrong between us and the guest agent."""

    code = "AgentError"


class AgentUnavailable(AgentError):
    """No guest agent answers."""

    code = "AgentUnavailable"


class AgentRefused(AgentError):
    """The guest agent answered a command with an error, or had nothing to freeze."""

    code = "AgentRefused"


class AgentTimeout(AgentError):
    """The guest agent took a command and did not answer in time: its outcome is unknown."""

    code = "AgentTimeout"


class FreezeOverrun(Failed):
    """The guest was, or may have been, thawed before the point in time: by the guard, or in the guest."""

    code = "FreezeOverrun"


class GuardLost(Failed):
    """The guard process died or hung: nothing would thaw the guest if the run died now."""

    code = "GuardLost"


class FilesystemError(Failed):
    """A file system or partition table of a guest contradicts itself, or is of a kind that is not supported.

    It says nothing of the repository: the guest may have stored it like that.
    """

    code = "FilesystemError"


class RestoreTestFailed(Failed):
    """A throw-away VM with the disks of a point did not boot, as far as it could be seen."""

    code = "RestoreTestFailed"


class TransferError(Failed):
    """Bytes could not be moved."""

    code = "TransferError"


class ReadFailed(TransferError):
    """The point-in-time view cannot be read; no byte of it may be guessed."""

    code = "ReadFailed"


class WriteFailed(TransferError):
    """The image, or another file of ours, cannot be written."""

    code = "WriteFailed"


@contextmanager
def moving(source: str, target: str) -> Iterator[None]:
    """Say in a TransferError of the block what could not be read or written, unless it has a subject."""
    try:
        yield
    except TransferError as err:
        writing = isinstance(err, WriteFailed)
        err.add(subject=f"cannot write {target}" if writing else f"cannot read {source}")
        raise


class RepositoryError(Failed):
    """Something is wrong with the repository."""

    code = "RepositoryError"


class NotARepository(RepositoryError):
    """The directory holds no repository of ours."""

    code = "NotARepository"


class RepositoryUnreadable(RepositoryError):
    """The operating system refused to read what is stored: nobody knows whether it is damaged."""

    code = "RepositoryUnreadable"


class UnknownFormat(RepositoryError):
    """The format version is not one that this backupctl knows."""

    code = "UnknownFormat"


class InvalidName(RepositoryError):
    """A name that must not become part of a path."""

    code = "InvalidName"
    exit_code = 2


class NoSuchPoint(RepositoryError):
    """No recovery point of that id, or none at all."""

    code = "NoSuchPoint"
    exit_code = 2


class AmbiguousPoint(RepositoryError):
    """The beginning of an id, with which the ids of several recovery points begin."""

    code = "AmbiguousPoint"
    exit_code = 2


class TargetExists(RepositoryError):
    """There is already something where a restore would write."""

    code = "TargetExists"
    exit_code = 2


WORST_FIRST = (3, 4, 1, 2, 75, 0)
"""Exit codes, of which a command for several VMs ends with the first that it met."""


def worst(failures: Sequence[BackupctlError]) -> BackupctlError:
    """Return the error whose exit code is the worst; of several the first."""
    return min(failures, key=lambda one: WORST_FIRST.index(one.exit_code))


_CROSSING: dict[str, type[BackupctlError]] = {
    kind.code: kind
    for kind in (
        *(Refused, Locked, MonitorUnreachable),
        *(AgentError, AgentUnavailable, AgentRefused, AgentTimeout, FreezeOverrun),
    )
}
"""The errors that the guard, or our program on another host, sends to its run; made of a message alone."""


def received(code: str, message: str, state: str) -> BackupctlError:
    """Return the error that another process of ours raised; of a code that none sends, a Failed."""
    return _CROSSING.get(code, Failed)(message, state=state)
