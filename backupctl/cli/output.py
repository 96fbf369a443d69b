# SPDX-License-Identifier: GPL-2.0-or-later
"""What the user sees: progress on a terminal, plain lines elsewhere, one JSON document for programs.

Everything that people read goes to stderr while a command works, results to stdout. With ``--json``
stdout holds one JSON document and nothing else.

Names and error texts come from outside (QEMU, manifests, the agent). They pass through `clean`, so that
none can move the cursor or colour the screen.
"""

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal, TextIO, TypeAlias

from backupctl.cli import units
from backupctl.errors import BackupctlError, Failed
from backupctl.outcome import clean_text, documents
from backupctl.progress import Overall

if TYPE_CHECKING:  # a dataclass takes half a millisecond to make, and most errors need none
    from backupctl.events import Event, Severity

LINE_SECONDS = 10.0
_FIRST_ROWS = 1000
"""As many rows of a table are held in memory; one that is longer is written as it comes."""


clean = clean_text.clean


@dataclass
class _Output:
    """What became of stdout. document: it holds that of `--json`. lost: why it takes no more.

    done: what the command did for good, whatever becomes of its words. kept: where documents go instead,
    while a command is called for one VM of several.
    """

    document: bool = False
    lost: OSError | None = None
    done: str = ""
    kept: "list[object] | None" = None

    def write(self, text: str) -> None:
        """Write, as far as it can be done: a reader that has left must not fail what is done."""
        if self.lost is None:
            try:
                sys.stdout.write(text)
            except OSError as err:
                self.lost = err

    def flush(self) -> None:
        """Have all that was written go out; from then on stdout is nowhere if that could not be."""
        if self.lost is None:
            try:
                sys.stdout.flush()
            except OSError as err:
                self.lost = err
        if self.lost is not None:
            # Else the interpreter tries once more as it ends, and leaves with 120.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_output = _Output()


def start() -> None:
    """Forget what an earlier call in this process wrote: its document must not pass for one of this call."""
    _output.document, _output.lost, _output.done, _output.kept = False, None, "", None


def done(what: str) -> None:
    """Note what the command has done for good: from now on nothing about its output makes it a failure."""
    _output.done = what


def is_done() -> bool:
    """Whether the command has done what it was to do."""
    return bool(_output.done)


def finish(code: int) -> int:
    """Bring out all that was printed; returns the exit code, which is `code` if nobody missed anything.

    A reader that has left (`list | head -1`) wants no more. A full disk fails a command whose result is its
    output, and only that.
    """
    _output.flush()
    lost, _output.lost = _output.lost, None
    if lost is None:
        return code
    why = "its reader has left" if isinstance(lost, BrokenPipeError) else lost.strerror
    if _output.done:
        print_message(f"cannot write more to standard output ({why}), but {_output.done}", "warning")
        return code
    if code or isinstance(lost, BrokenPipeError):
        return code
    print_error(Failed(f"cannot write to standard output: {why}", state="nothing was changed"), as_json=False)
    return Failed.exit_code


def print_json(document: object) -> None:
    """Write the one document to stdout."""
    if _output.kept is not None:
        _output.kept.append(document)
        return
    _output.document = True
    _output.write(json.dumps(document, indent=2, ensure_ascii=True) + "\n")
    _output.flush()


def print_json_list(parts: Iterable[object]) -> None:
    """Write the one document to stdout, a list: each part as it comes, since not all may fit into memory.

    If `parts` raises, what was written is not complete JSON, and nothing can be taken for all of it.
    """
    if _output.kept is not None:
        _output.kept.append(list(parts))
        return
    before, end = "[\n  ", "[]\n"
    for part in parts:
        _output.document = True
        # Line breaks in texts are escaped: each one here is of the layout.
        _output.write(before + json.dumps(part, indent=2, ensure_ascii=True).replace("\n", "\n  "))
        before, end = ",\n  ", "\n]\n"
    _output.document = True
    _output.write(end)
    _output.flush()


@contextmanager
def keeping_documents() -> Iterator[list[object]]:
    """Have the documents of the block put into a list, in place of stdout."""
    kept: list[object] = []
    _output.kept = kept
    try:
        yield kept
    finally:
        _output.kept = None


def print_line(text: str) -> None:
    """Write a line of a result to stdout; on a terminal it is wrapped between words."""
    text = clean(text)
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    _output.write(wrapped("", text, indent, sys.stdout) + "\n")


def print_content(content: bytes) -> None:
    """Write the text of a stored file to stdout: as it is to a pipe or file, cleaned to a terminal."""
    text = content.decode(errors="replace")
    if sys.stdout.isatty():
        text = "\n".join(clean(line) for line in text.splitlines()) + "\n"
    _output.write(text)


def print_styled(text: str) -> None:
    """Write to stdout what `rich` has made, its own escape sequences in it; what is in it must be clean."""
    _output.write(text)


def print_wrapped(head: str, text: str) -> None:
    """Write a line of a result to stdout; on a terminal what does not fit goes on below, behind the head."""
    _output.write(wrapped(clean(head), clean(text), " " * len(head), sys.stdout) + "\n")


def wrapped(head: str, text: str, indent: str, stream: TextIO) -> str:
    """Return a text behind its head; for a terminal wrapped between words, with what goes on indented."""
    if not stream.isatty():
        return head + text
    return textwrap.fill(
        text,
        columns(least=40, margin=0),
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    spare: Sequence[str] = (),
    narrow: bool = False,
) -> None:
    """Write a table to stdout: columns as wide as needed, those ending in ">" to the right.

    Of a long table the first rows decide how wide. spare: columns that a terminal does without if it is too
    narrow for all, the first of them first. narrow: leave out the last column if it is empty.
    """
    left = iter(rows)
    first = [[clean(cell) for cell in row] for row in islice(left, _FIRST_ROWS)]
    more = next(left, None)
    heads = [heading.removesuffix(">") for heading in headings]
    table = [
        _Column(number, head, heading.endswith(">"), max(map(len, (head, *(row[number] for row in first)))))
        for number, (heading, head) in enumerate(zip(headings, heads, strict=True))
    ]
    if narrow and more is None and not any(row[-1] for row in first):  # 80 columns are soon full
        table.pop()
    if sys.stdout.isatty():
        table = _narrowed(table, spare, columns(least=40, margin=0))
    form = "  ".join([column.field for column in table]).__mod__
    numbers = [column.number for column in table]
    _write_rows([heads, *first], form, numbers)
    left = chain([] if more is None else [more], left)
    while rows_now := list(islice(left, _FIRST_ROWS)):
        _write_rows(rows_now, form, numbers)
    _output.flush()


def _write_rows(rows: Sequence[Sequence[object]], form: Callable[[object], str], numbers: list[int]) -> None:
    """Write rows of a table, which need not be clean. form: what makes a line of the cells in it."""
    cells = rows if numbers == list(range(len(rows[0]))) else [[row[one] for one in numbers] for row in rows]
    lines = [form(tuple(row)).rstrip() for row in cells]
    if not "".join(lines).isprintable():
        lines = [form(tuple(map(clean, row))).rstrip() for row in cells]
    _output.write("\n".join(lines) + "\n")


@dataclass(frozen=True)
class _Column:
    """A column of a table. number: from 0, of its cell in each row."""

    number: int
    heading: str
    to_the_right: bool
    width: int

    @property
    def field(self) -> str:
        """A conversion of `%`, for a row."""
        return f"%{'' if self.to_the_right else '-'}{self.width}s"


def _narrowed(table: list[_Column], spare: Sequence[str], limit: int) -> list[_Column]:
    """Return the columns that fit."""
    for heading in spare:
        if sum(column.width + 2 for column in table) - 2 <= limit:
            break
        table = [column for column in table if column.heading != heading]
    return table


def printable(text: str, instead: str, stream: TextIO | None = None) -> str:
    """Return the text if the encoding of a stream (stdout) has its characters."""
    try:
        text.encode((stream or sys.stdout).encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return instead
    return text


def columns(*, least: int, margin: int) -> int:
    """Return how many columns there are beside a margin, and never fewer than `least`."""
    return max(shutil.get_terminal_size().columns - margin, least)


def print_error(err: BackupctlError, *, as_json: bool, log: str = "") -> None:
    """Say what failed, at which step, what is the case now, and what to run next. log: where details are.

    Programs get it as the one document, unless a command had its own: then exit code and stderr tell.
    """
    if as_json and not _output.document:
        print_json({"error": {**documents.error(err), "log": log or None}})
    lines = [wrapped("backupctl: ", clean(err.message), "  ", sys.stderr)]
    for name, text in (
        ("step", err.step),
        ("state", err.state),
        ("hint", err.hint),
        ("next", err.next_command),
        ("log", log),
    ):
        if text:
            head = f"  {name + ':':<7}"
            # A command or a path stays in one line: it is to be copied.
            whole = name in ("next", "log")
            lines.append(head + clean(text) if whole else wrapped(head, clean(text), " " * 9, sys.stderr))
    head = _priority("error")
    print_to_stderr([head + line for text in lines for line in text.split("\n")])


Level: TypeAlias = "Severity | Literal['debug', 'error']"
_LABELS: "dict[Level, str]" = {"debug": "debug: ", "step": "", "note": "note: ", "warning": "warning: "}
_PRIORITIES: "dict[Level, int]" = {"debug": 7, "step": 6, "note": 6, "warning": 4, "error": 3}


def print_message(text: str, level: "Level") -> None:
    """Write a line to stderr; on a terminal it is wrapped between words. Never raises."""
    line = message_line(clean(text), level)
    print_to_stderr([line if level == "debug" else wrapped("", line, "  ", sys.stderr)])


def message_line(text: str, level: "Level") -> str:
    """Return the line that tells a clean text."""
    return f"{_priority(level)}backupctl: {_LABELS[level]}{text}"


def print_to_stderr(lines: Sequence[str]) -> None:
    """Write lines to stderr. Never raises."""
    with suppress(OSError):  # whoever reads stderr may leave; the run, and its roll-back, must go on
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()


def _priority(level: "Level") -> str:
    return f"<{_PRIORITIES[level]}>" if _is_journal(sys.stderr) else ""


def _is_journal(stream: TextIO) -> bool:
    """Whether a stream goes to systemd's journal, which takes a line's priority from `<N>` at its start.

    systemd tells the device and inode of that stream (systemd.exec(5), JOURNAL_STREAM; sd-daemon(3)).
    """
    told = os.environ.get("JOURNAL_STREAM")
    if told:
        with suppress(OSError, ValueError):
            found = os.fstat(stream.fileno())
            return told == f"{found.st_dev}:{found.st_ino}"
    return False


class LineReporter:
    """A Reporter for logs: a line for each step, and one every ten seconds while bytes move."""

    def __init__(self) -> None:
        self._told = 0.0
        self._overall = Overall()

    def event(self, event: "Event") -> None:
        """Write a line."""
        if event.severity == "step":
            self._overall.step()
        print_message(event.text, event.severity)

    def progress(self, disk: str, done_bytes: int, total_bytes: int) -> None:
        """So much is copied."""
        self._overall.note(disk, done_bytes, total_bytes)
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS and self._overall.done_bytes:
            self._told = now
            print_message(progress_text(self._overall), "step")


def progress_text(overall: Overall) -> str:
    """Say in one line how far all disks are together, how fast it goes, and when it ends."""
    labels, total = overall.labels, overall.total_bytes
    share = 100 * overall.done_bytes // total if total else 100
    who = labels[0] if len(labels) == 1 else f"{len(labels)} disks"
    text = f"{who}: {share} % of {units.size(total)}"
    if overall.rate is not None:
        text += f", {units.size(round(overall.rate))}/s"
    left = overall.left_seconds
    return f"{text}, {units.duration(left)} left" if left else text


class WarningReporter:
    """A Reporter for timers whose output is mailed: warnings only."""

    def event(self, event: "Event") -> None:
        """Write a warning; ignore anything else."""
        if event.severity == "warning":
            print_message(event.text, event.severity)

    def progress(self, disk: str, done_bytes: int, total_bytes: int) -> None:
        """Do nothing."""
