# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of log lines: `-v`, `--log-file`, `--log-format`, and the transcript of a run that fails.

The last lines are always kept in memory, so that a run that fails unattended can leave them
(`crash_log.py`). Events are logged as well, but `-v` leaves them out: the Reporter shows them already.
"""

import json
import logging
import os
import select
import stat
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, Self, TextIO

import click

from backupctl.cli import output
from backupctl.cli.invocation import Invocation
from backupctl.errors import UNTOUCHED, UsageError
from backupctl.outcome import documents
from backupctl.system import safe_directory
from backupctl.system.log import Shown

_ROOT = "backupctl"
_MOST_LINES = 2000  # a run makes some 300
_MOST_CHARACTERS = 2000
_MOST_UNMADE = 300


class _Formatter(logging.Formatter):
    """Makes a line of a record. as_json: an object with time, level, logger, message, an event's fields."""

    as_json = False

    def format(self, record: logging.LogRecord) -> str:
        """Return one line without its end."""
        moment = time.gmtime(record.created)
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', moment)}.{int(record.msecs):03}Z"
        level, message = record.levelname.lower(), record.getMessage()[:_MOST_CHARACTERS]
        if not self.as_json:
            return output.clean(f"{stamp} {level:<7} {_room(record)}: {message}")
        found = {"time": stamp, "level": level, "logger": record.name, "message": message}
        event = getattr(record, "event", None)
        return json.dumps({**(documents.event(event) if event else {}), **found}, default=str)


class _Handler(logging.Handler):
    """A handler whose own failures are nobody's: a log that cannot be written must not fail a run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing."""


class _Transcript(_Handler):
    """Keeps the last lines in memory.

    To make lines of messages is a third of what a run does itself, and most runs need none. So the newest are
    made when they are asked for. They are few, since a message may be large.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(_Formatter())
        self._made: deque[str] = deque(maxlen=_MOST_LINES)
        self._newest: deque[logging.LogRecord | str] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._newest.append(record if _may_wait(record) else self.format(record))
        if len(self._newest) > _MOST_UNMADE:
            self._made.append(self._line(self._newest.popleft()))

    @property
    def lines(self) -> tuple[str, ...]:
        """The last lines, oldest first."""
        return (*self._made, *map(self._line, self._newest))[-_MOST_LINES:]

    def _line(self, one: logging.LogRecord | str) -> str:
        return one if isinstance(one, str) else self.format(one)


def _may_wait(record: logging.LogRecord) -> bool:
    """Whether what a line shows is the same later, and little memory is held until then.

    An exception would keep alive all that its frames hold, connections too.
    """
    shown = record.args if isinstance(record.args, tuple) else (record.args,)
    return record.exc_info is None and all(map(_may_be_kept, shown))


def _may_be_kept(argument: object) -> bool:
    if isinstance(argument, Shown):
        return argument.is_small
    if isinstance(argument, str):
        return len(argument) <= _MOST_CHARACTERS
    return argument is None or isinstance(argument, int | float | PurePath)


class _Stderr(_Handler):
    """Shows on stderr what no Reporter shows. It never waits: the guest may be frozen.

    While a terminal is stopped (Ctrl-S), or a pipe is full, lines are kept for later.
    """

    def __init__(self, formatter: _Formatter) -> None:
        super().__init__(logging.DEBUG)
        self._formatter = formatter
        self._waiting: deque[str] = deque(maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless it is of an event."""
        if hasattr(record, "event"):
            return
        if self._formatter.as_json:
            self._waiting.append(self._formatter.format(record))
        else:
            message = output.clean(f"{_room(record)}: {record.getMessage()}")
            self._waiting.append(output.message_line(message[:_MOST_CHARACTERS], "debug"))
        while self._waiting and takes_more(sys.stderr):
            output.print_to_stderr([self._waiting.popleft()])


class _File(_Handler):
    """Appends to a file that is open from the start to the end."""

    def __init__(self, path: Path, formatter: _Formatter) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(formatter)
        self.path = path
        self._descriptor = _opened(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line, whole: several runs may write to one file."""
        with suppress(OSError):
            os.write(self._descriptor, f"{self.format(record)}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = -1
        super().close()


class Logs:
    """Where the log lines of one call of the command line go."""

    def __init__(self) -> None:
        self._logger = logging.getLogger(_ROOT)
        self._formatter = _Formatter()
        self._transcript = _Transcript()
        self._file: _File | None = None
        self._handlers: list[logging.Handler] = [self._transcript]
        self._entered = False
        self.verbose = False

    def __enter__(self) -> Self:
        self._entered = True
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        for handler in self._handlers:
            self._logger.addHandler(handler)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered = False
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        self._logger.setLevel(logging.NOTSET)
        self._logger.propagate = True

    def show(self) -> None:
        """Show the lines on stderr, too."""
        if not self.verbose:
            self.verbose = True
            self._add(_Stderr(self._formatter))

    def append_to(self, path: Path) -> None:
        """Append the lines to a file, too. Raises UsageError."""
        if self._file is not None:
            raise UsageError("--log-file was given twice", state=UNTOUCHED)
        self._file = _File(path, self._formatter)
        self._add(self._file)

    def as_json(self) -> None:
        """Write JSON, a line for each record, in place of text."""
        self._formatter.as_json = True

    def _add(self, handler: logging.Handler) -> None:
        self._handlers.append(handler)
        # Options may be parsed where no call is under way: a handler of those would stay for ever.
        if self._entered:
            self._logger.addHandler(handler)

    @property
    def file(self) -> Path | None:
        """The file of --log-file."""
        return self._file.path if self._file else None

    @property
    def transcript(self) -> tuple[str, ...]:
        """The last lines."""
        return self._transcript.lines


_current: list[Logs] = []
"""That of the call under way; logging itself is one for the process."""


def begin() -> Logs:
    """Return a context manager: the logs of one call of the command line."""
    _current[:] = [Logs()]
    return _current[0]


def current() -> Logs:
    """Return the logs of the call under way."""
    return _current[0] if _current else begin()


def _verbose(_context: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given:
        current().show()


def _log_file(context: click.Context, _parameter: click.Parameter, given: str | None) -> None:
    again = Invocation.of(context).only is not None  # parsed once more, for one VM of several
    if given is not None and not again:
        current().append_to(Path(given))


def _log_format(_context: click.Context, _parameter: click.Parameter, given: str | None) -> None:
    if given == "json":
        current().as_json()


def add_options(command: click.Command, *, hidden: bool = False) -> click.Command:
    """Give a command the options of logs, once. hidden: not in its help.

    The group and every command have them, so that they may stand on either side of the command's name.
    """
    options: dict[str, dict[str, Any]] = {
        "verbose": {
            "decls": ("-v", "--verbose"),
            "is_flag": True,
            "callback": _verbose,
            "help": "Show on stderr what is sent to QEMU and the guest agent, and what is written.",
        },
        "log_file": {
            "decls": ("--log-file",),
            "metavar": "FILE",
            "callback": _log_file,
            "help": "Append the same to FILE, with times. Another user's file is refused.",
        },
        "log_format": {
            "decls": ("--log-format",),
            "type": click.Choice(["text", "json"]),
            "callback": _log_format,
            "help": "How lines of --log-file and -v look: text (the default), or a JSON object each.",
        },
    }
    if not any(one.name in options for one in command.params):
        for option in options.values():
            made = click.Option(option.pop("decls"), expose_value=False, hidden=hidden, **option)
            command.params.append(made)
    return command


def takes_more(stream: TextIO) -> bool:
    """Whether a line can be written without waiting: poll promises a pipe 4096 bytes, more than any line."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # no file
        return True
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT)
    return bool(waiting.poll(0))


def _room(record: logging.LogRecord) -> str:
    return record.name.removeprefix(f"{_ROOT}.")


def _opened(path: Path) -> int:
    """Open a log file for appending. Raises UsageError.

    In a directory that others may write to, somebody could put a link there, or a file of his own in which he
    would read what we log; or a link in the place of a directory on the way, so that the log becomes another
    file of root's. None of these is written to.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with safe_directory.opened_where_it_is(path.parent) as directory:
            descriptor = os.open(path.name, flags, 0o600, dir_fd=directory)
    except OSError as err:
        raise _refused(path, err.strerror) from err
    except UsageError as err:
        raise _refused(path, err.message) from err
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise _refused(path, "it is not a regular file of yours with one name")


def _refused(path: Path, why: str | None) -> UsageError:
    return UsageError(f"cannot open the log file {path}: {why}", state=UNTOUCHED)
