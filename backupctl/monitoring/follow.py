# SPDX-License-Identifier: GPL-2.0-or-later
"""What follows a result: it is remembered, Prometheus's file is written, and a notice is sent if one is due.

Nothing here fails a command: what cannot be done is yielded as a warning.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from backupctl.errors import BackupctlError
from backupctl.events import Event
from backupctl.events.monitoring import MetricsNotWritten, NoticeNotSent
from backupctl.monitoring import channels as ways
from backupctl.monitoring import exposition, memory, metrics, notices
from backupctl.monitoring.channels import Attempt, Channels
from backupctl.monitoring.memory import Memory, Past, Record, Told
from backupctl.monitoring.metrics import Stored
from backupctl.monitoring.result import Kind, Result
from backupctl.names import VmName
from backupctl.repository.repository import Repository


@dataclass(frozen=True)
class Follower:
    """What follows the results of a command on one VM.

    state: the directory in which they are remembered; None if this VM's are not. textfile: where metrics are
    written, as `exposition.file_of` takes it. state_is_asked_for: whether the configuration has metrics or
    notices; otherwise a directory that cannot be written to is no reason for a warning.
    """

    vm: VmName
    repository: Path
    channels: Channels
    state: Path | None = None
    textfile: Path | None = None
    state_is_asked_for: bool = True

    def ping(self, result: Result) -> Iterator[Event]:
        """Tell healthchecks that a backup has started, or how it ended."""
        yield from _troubles(ways.ping(self.channels, result))

    def end(self, kind: Kind, result: Result, *, partial: bool = False) -> Iterator[Event]:
        """Do all that follows a result. partial: of a verify that did not read all of the VM."""
        record = Record.of(result, partial=partial)
        before = Past()
        if self.state is not None:
            try:
                with memory.locked(self.state, self.vm):
                    known = self._read(self.state)
                    before = known.of(kind)
                    known = known.with_past(kind, before.after(record))
                    memory.write(self.state, self.vm, known)
                    yield from self._write_metrics(known)
            except (OSError, BackupctlError) as err:
                if self.state_is_asked_for:
                    yield MetricsNotWritten(self.state, _why(err))
        if not before.hides(record):
            yield from self._notify(kind, before, result)

    def _read(self, state: Path) -> Memory:
        return memory.read(state, self.vm, str(self.repository))

    def _write_metrics(self, known: Memory) -> Iterator[Event]:
        if self.textfile is None:
            return
        directory, name = exposition.file_of(self.textfile, self.vm)
        try:
            found = metrics.gauges(self.vm, known, self.repository, self._stored())
            exposition.write(directory, name, exposition.text(found))
        except (OSError, BackupctlError) as err:
            yield MetricsNotWritten(directory / name, _why(err))

    def _stored(self) -> Stored | None:
        try:
            return metrics.look(Repository.open(self.repository).vm(self.vm))
        except BackupctlError:
            return None

    def _notify(self, kind: Kind, before: Past, result: Result) -> Iterator[Event]:
        now, asked = time.time(), self.channels
        why = notices.due(before, result, now, asked.repeat_seconds, on_success=asked.success)
        if why is None:
            return
        attempts = list(ways.send(asked, notices.compose(why, result)))
        yield from _troubles(attempts)
        # Only what has reached somebody counts as told: else a failure would be silent until it is repeated.
        if self.state is not None and not all(one.why for one in attempts):
            with suppress(OSError, BackupctlError):  # the next failure is told once more
                self._remember_notice(self.state, kind, notices.told(before, why, result, now))

    def _remember_notice(self, state: Path, kind: Kind, said: Told | None) -> None:
        with memory.locked(state, self.vm):
            known = self._read(state)
            past = known.of(kind)
            known = known.with_past(kind, msgspec.structs.replace(past, told=said))
            memory.write(state, self.vm, known)


def _troubles(attempts: "Iterator[Attempt] | list[Attempt]") -> Iterator[Event]:
    for one in attempts:
        if one.why:
            yield NoticeNotSent(one.channel, one.why)


def _why(err: OSError | BackupctlError) -> str:
    if isinstance(err, BackupctlError):
        return err.message
    return err.strerror or str(err)
