# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs on a pseudo-terminal, and what somebody in front of it sees when they have ended."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\]8;[^\x1b]*\x1b\\|([\r\n\b])|([^\x1b\r\n\b]+)")
_TAIL = re.compile(r"\x1b[^A-Za-z]*\Z")
PATIENCE_SECONDS = 240.0


@dataclass
class Screen:
    """A terminal as far as our output uses one: lines are overwritten and erased; colours are not kept."""

    columns: int
    lines: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0
    _pending: str = ""

    def feed(self, text: str) -> None:
        """Show what a program has written."""
        text = self._pending + text
        cut = _TAIL.search(text)
        self._pending = cut[0] if cut else ""
        for found in _SEQUENCE.finditer(text.removesuffix(self._pending)):
            parameters, letter, control, plain = found.groups()
            if plain:
                self._print(plain)
            elif control:
                self._move(control)
            elif letter:
                self._command(parameters, letter)

    def text(self) -> str:
        """Return all that can be seen, without blanks at the ends of lines."""
        return "\n".join(line.rstrip() for line in self.lines).strip("\n") + "\n"

    def _print(self, text: str) -> None:
        for character in text:
            if self.column == self.columns:
                self._move("\r")
                self._move("\n")
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _move(self, control: str) -> None:
        if control == "\n":
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append("")
        self.column = max(self.column - 1, 0) if control == "\b" else self.column if control == "\n" else 0

    def _command(self, parameters: str, letter: str) -> None:
        if letter == "A":
            self.row = max(self.row - int(parameters or 1), 0)
        elif letter == "K":
            kept = "" if parameters == "2" else self.lines[self.row][: self.column]
            self.lines[self.row] = kept
        elif letter not in "mhl":
            raise AssertionError(f"the screen does not know ESC [ {parameters} {letter}")


class Terminal:
    """Runs one shell command after the other on a pseudo-terminal of its own."""

    def __init__(self, directory: Path, environment: dict[str, str], columns: int = 80) -> None:
        self._directory = directory
        self._environment = environment
        self._columns = columns

    def types(self, command: str, *, kill_at: str = "") -> str:
        """Run a command; return what is to be seen then, and the exit code if it is not 0.

        kill_at: a text; SIGKILL ends the program as soon as it has been written.
        """
        screen = Screen(self._columns)
        code = self._run(["/bin/bash", "-c", command], screen, kill_at)
        ended = "" if not code else "[killed]\n" if code < 0 else f"[exit code {code}]\n"
        return f"$ {command}\n{screen.text()}{ended}".replace("\n\n[", "\n[")

    def _run(self, words: Sequence[str], screen: Screen, kill_at: str) -> int:
        terminal, theirs = pty.openpty()
        try:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, self._columns, 0, 0))
            child = subprocess.Popen(
                words,
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=self._directory,
                env=self._environment,
                start_new_session=True,
            )
        except BaseException:
            os.close(terminal)
            raise
        finally:
            os.close(theirs)
        try:
            self._watch(terminal, child, screen, kill_at)
            return child.wait(PATIENCE_SECONDS)
        finally:
            child.kill()
            child.wait()
            os.close(terminal)

    def _watch(self, terminal: int, child: "subprocess.Popen[bytes]", screen: Screen, kill_at: str) -> None:
        """Read until the last program on the terminal has ended."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        deadline = time.monotonic() + PATIENCE_SECONDS
        seen = ""
        while True:
            assert time.monotonic() < deadline, f"no end: {screen.text()}"
            if not select.select([terminal], [], [], 0.5)[0]:
                continue
            try:
                got = os.read(terminal, 65536)
            except OSError:  # EIO: nobody has it open any more
                return
            screen.feed(decoder.decode(got))
            seen += got.decode(errors="replace")
            if kill_at and kill_at in seen:
                os.kill(child.pid, signal.SIGKILL)
                kill_at = ""
