# SPDX-License-Identifier: GPL-2.0-or-later
"""What the user sees: progress on a terminal, plain lines elsewhere, one JSON document for programs.

Everything that people read goes to stderr while a command works, results to stdout. With ``--json``
stdout holds one JSON document and nothing else.

Names and error texts come from outside (QEMU, manifests, the agent). They pass through `clean`, so that
none can move the cursor or colour the screen.
"""

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from backupctl.errors import BackupctlError
from backupctl.names import DiskName
from backupctl.report import Reporter

_LINE_SECONDS = 10.0


def clean(text: object) -> str:
    """Return a text without control characters; nor may it begin a line of its own, as if we said it."""
    return "".join(
        character if character.isprintable() else f"\\x{ord(character):02x}" for character in str(text)
    )


class _Said:
    """What stdout has got. document: the one of `--json`."""

    document = False


def print_json(document: object) -> None:
    """Write the one document to stdout."""
    _Said.document = True
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Write a line of a result to stdout."""
    sys.stdout.write(clean(text) + "\n")


def print_wrapped(head: str, text: str) -> None:
    """Write a line of a result to stdout; on a terminal what does not fit goes on below, behind the head."""
    wrapped = textwrap.fill(
        clean(text),
        columns(least=40, margin=0) if sys.stdout.isatty() else sys.maxsize,
        initial_indent=clean(head),
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
    sys.stdout.write(wrapped + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to stdout, at once: columns as wide as needed, those ending in ">" to the right."""
    lines = [
        [column.removesuffix(">") for column in columns],
        *([clean(cell) for cell in row] for row in rows),
    ]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    for line in lines:
        cells = (
            text.rjust(width) if column.endswith(">") else text.ljust(width)
            for column, text, width in zip(columns, line, widths, strict=True)
        )
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    sys.stdout.flush()


def printable(text: str, instead: str) -> str:
    """Return the text if stdout's encoding has its characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return instead
    return text


def columns(*, least: int, margin: int) -> int:
    """Return how many columns there are beside a margin, and never fewer than `least`."""
    return max(shutil.get_terminal_size().columns - margin, least)


def print_error(err: BackupctlError, *, as_json: bool) -> None:
    """Say what failed, at which step, what is the case now, and what to run next.

    Programs get it as the one document, unless a command had its own: then exit code and stderr tell.
    """
    if as_json and not _Said.document:
        print_json({"error": error_document(err)})
    lines = [f"backupctl: {clean(err.message)}"]
    for name, text in (("step", err.step), ("state", err.state), ("next", err.next_command)):
        if text:
            lines.append(f"  {name + ':':<7}{clean(text)}")
    with suppress(OSError):
        sys.stderr.write("\n".join(lines) + "\n")


def error_document(err: BackupctlError) -> dict[str, Any]:
    """Return an error for programs."""
    return {
        "kind": type(err).__name__,
        "message": err.message,
        "step": err.step,
        "state": err.state,
        "next": err.next_command,
        "exit_code": err.exit_code,
    }


class Lines:
    """A Reporter for logs: a line for each step, and one every ten seconds while bytes move."""

    def __init__(self) -> None:
        self._told = 0.0

    def step(self, text: str) -> None:
        """A step begins."""
        self._write(text)

    def note(self, text: str) -> None:
        """Something to know."""
        self._write(f"note: {text}")

    def warn(self, text: str) -> None:
        """Something to act on some time."""
        self._write(f"warning: {text}")

    def progress(self, disk: DiskName, done_bytes: int, total_bytes: int) -> None:
        """So much is copied."""
        now = time.monotonic()
        if now - self._told >= _LINE_SECONDS:
            self._told = now
            share = 100 * done_bytes // total_bytes if total_bytes else 100
            self._write(f"{disk}: {share} % of {total_bytes >> 20} MiB")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # who reads our words may leave; the run, or its roll-back, must not
            sys.stderr.write(f"backupctl: {clean(text)}\n")
            sys.stderr.flush()


class Quiet(Lines):
    """A Reporter for timers whose every word is a mail: warnings only."""

    def step(self, text: str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def progress(self, disk: DiskName, done_bytes: int, total_bytes: int) -> None:
        """Say nothing."""


@contextmanager
def reporter(*, quiet: bool = False) -> Iterator[Reporter]:
    """Give the Reporter that fits stderr."""
    if quiet:
        yield Quiet()
        return
    if not sys.stderr.isatty():
        yield Lines()
        return
    from backupctl.cli import live  # noqa: PLC0415 - rich takes a tenth of a run's start; timers need none of it

    with live.reporter() as reporter:
        yield reporter
