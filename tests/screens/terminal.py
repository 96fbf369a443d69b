# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of the command line, in this process, with streams that look like a terminal or a pipe."""

import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from backupctl.cli import output as screen
from backupctl.cli.main import main

_CURSOR = re.compile(r"\x1b\[\?25[lh]")
_ERASED = re.compile(r"(?:\r|\x1b\[1A|\x1b\[2K)+")
_BAR = re.compile(r"iB\S* .*(?:--:--|\d\d:\d\d)")


@dataclass(frozen=True)
class Look:
    """How a screen is looked at. columns: 0 for a pipe. encoding: of stdout and stderr."""

    columns: int
    encoding: str
    colour: bool

    def __str__(self) -> str:
        where = f"{self.columns} columns" if self.columns else "pipe"
        return f"{where}, {self.encoding}, {'colour' if self.colour else 'no colour'}"


LOOKS = tuple(
    Look(columns, encoding, colour)
    for columns, encoding, colour in itertools.product((0, 60, 80, 120), ("utf-8", "ascii"), (False, True))
)


class _Stream(io.TextIOWrapper):
    """A text stream in memory that says of itself whether it is a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def _stream(look: Look) -> _Stream:
    made = _Stream(io.BytesIO(), encoding=look.encoding, errors="backslashreplace", write_through=True)
    made.terminal = bool(look.columns)
    return made


def _text(stream: _Stream, look: Look) -> str:
    found = stream.buffer.getvalue().decode(look.encoding)  # type: ignore[attr-defined]
    lines = (_left_standing(line) for line in _CURSOR.sub("", found).split("\n"))
    return "\n".join(lines).replace("\x1b", "\\e")


def _left_standing(line: str) -> str:
    """Return what is still to be seen of a line that was erased and written again; a bar is but named."""
    last = _ERASED.split(line)[-1]
    return "  (bar)" if _BAR.search(last) else last


def look_at(arguments: Sequence[str], look: Look, monkeypatch: pytest.MonkeyPatch) -> str:
    """Call the command line; return what is seen of stdout, then of stderr, and the exit code."""
    with monkeypatch.context() as patched:
        output, errors = _stream(look), _stream(look)
        patched.setattr(sys, "stdout", output)
        patched.setattr(sys, "stderr", errors)
        patched.setattr(sys, "argv", ["backupctl", *arguments])
        patched.setattr(screen, "_output", screen._Output())
        patched.setenv("COLUMNS", str(look.columns or 80))
        patched.setenv("LINES", "40")
        patched.setenv("TERM", "xterm-256color")
        for name in ("FORCE_COLOR", "COLORTERM", "BACKUPCTL_CONFIG"):
            patched.delenv(name, raising=False)
        patched.delenv("NO_COLOR", raising=False)
        if not look.colour:
            patched.setenv("NO_COLOR", "1")
        with pytest.raises(SystemExit) as ended:
            main()
        parts = [f"exit code {ended.value.code}"]
        for name, stream in (("stdout", output), ("stderr", errors)):
            if text := _text(stream, look):
                parts.append(f"{name}:\n{text}")
        return "\n".join(parts).rstrip("\n") + "\n"


def every_look(call: Callable[[Look], str]) -> str:
    """Return a screen at every look; those that look the same are told together."""
    seen: dict[str, list[str]] = {}
    for look in LOOKS:
        seen.setdefault(call(look), []).append(str(look))
    sections = (
        "".join(f"═══ {look}\n" for look in looks) + text.replace("\n", "\n    ").rstrip(" ")
        for text, looks in seen.items()
    )
    return "\n".join(sections)
