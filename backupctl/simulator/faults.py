# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to go wrong, and when: one small language for command line, control socket, tests and drills.

::

    qmp:COMMAND[@WHEN]=DEED[:ARGUMENT]       a monitor command          COMMAND may hold * and ?
    agent:COMMAND[@WHEN]=DEED[:ARGUMENT]     a guest agent's command
        WHEN   N the Nth call (1 if left out) · N+ from the Nth on · * each
        DEED   error[:TEXT]      answer an error, do nothing
               error-after[:TEXT]        do it, answer an error
               answer:VALUE      do nothing, answer this JSON value
               late:SECONDS      do it, answer later
               silent            do nothing, never answer
               unanswered        do it, never answer
               garbage           do nothing, answer nonsense
               hangup            close the connection, do nothing
               lost              do it, close the connection instead of answering
               kill, kill-after  vanish as by SIGKILL, before or after doing it
               quit, quit-after  end cleanly, before or after doing it
               crash, crash-after        vanish and come back, bitmaps as QEMU leaves them
               restart, restart-after    end cleanly and come back
    nbd:sent@BYTES=drop|stall|short|garbage  when so many bytes of data have been sent in all
    nbd:read@FIRST-LAST=error[:ERRNO]        reads that touch these bytes of a disk (EIO)
    nbd:status@FIRST-LAST=error[:ERRNO]      block status there
    scratch:NODE=full:BYTES                  files of nodes of that name take so much; NODE may hold * and ?

Numbers take k, M, G, T (powers of 1024).
"""

import errno
import fnmatch
import json
import os
import re
from dataclasses import dataclass
from enum import Enum

PLAIN = ("silent", "unanswered", "garbage", "hangup", "lost")
ENDS = ("kill", "quit", "crash", "restart")
DEEDS = {"error", "error-after", "answer", "late", *PLAIN, *ENDS, *(f"{end}-after" for end in ENDS)}
_SPEC = re.compile(
    r"(qmp|agent|nbd|scratch):([A-Za-z0-9_*?#.-]+)(?:@([^=]+))?=([a-z-]+)(?::(.*))?", re.DOTALL
)
_NUMBER = re.compile(r"([0-9]{1,18})([kMGT]?)")
_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class BadFault(ValueError):
    """A text is no fault of the language."""


class Stream(Enum):
    """What becomes of data on their way to an NBD client."""

    DROP = "drop"
    STALL = "stall"
    SHORT = "short"
    GARBAGE = "garbage"


@dataclass
class Fault:
    """One fault.

    where: qmp, agent, nbd or scratch. what: command, sort of NBD traffic, or node, perhaps as a pattern.
    first, last: calls counted from 1, or bytes; last is None for no end. calls: how many there were.
    """

    text: str
    where: str
    what: str
    first: int
    last: int | None
    deed: str
    argument: str
    calls: int = 0

    @property
    def seconds(self) -> float:
        """The argument of `late`."""
        return float(self.argument or 1)

    @property
    def value(self) -> object:
        """The argument of `answer`."""
        return json.loads(self.argument)

    def touches(self, offset: int, length: int) -> bool:
        """Whether a range of bytes meets the fault's."""
        return offset + length > self.first and (self.last is None or offset <= self.last)


def parse(text: str) -> Fault:
    """Read one fault. Raises BadFault, saying what is wrong."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise BadFault(f"{text!r} is no fault: WHERE:WHAT[@WHEN]=DEED[:ARGUMENT] is meant")
    where, what, when, deed, argument = match[1], match[2], match[3] or "", match[4], match[5] or ""
    if where in ("qmp", "agent"):
        first, last = _calls(text, when)
        _check(text, deed, DEEDS)
        if deed == "late":
            _seconds(text, argument)
        if deed == "answer":
            _json(text, argument)
    elif where == "scratch":
        first, last = 0, None
        _check(text, deed, {"full"})
        number(argument)
    elif what == "sent":
        first, last = number(when), None
        _check(text, deed, {each.value for each in Stream})
    else:
        _check(text, what, {"read", "status"})
        _check(text, deed, {"error"})
        first, last = _range(when)
        if argument and argument not in errno.errorcode.values():
            raise BadFault(f"{text!r}: {argument!r} is no errno")
    return Fault(text, where, what, first, last, deed, argument)


def number(text: str) -> int:
    """Read a number with a unit. Raises BadFault."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BadFault(f"{text!r} is no number of bytes")
    return int(match[1]) * _UNITS[match[2]]


class Faults:
    """All faults in force, and the counting that they need."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._sent_bytes = 0

    def add(self, text: str) -> Fault:
        """Put a fault into force; calls and bytes are counted from now on. Raises BadFault."""
        fault = parse(text)
        self.faults.append(fault)
        if fault.what == "sent":
            fault.first += self._sent_bytes
        return fault

    def clear(self) -> None:
        """Let everything go well from now on."""
        self.faults = []

    def command(self, where: str, name: str) -> Fault | None:
        """Count a command and return what is to become of it."""
        chosen = None
        for fault in self.faults:
            if fault.where == where and fnmatch.fnmatchcase(name, fault.what):
                fault.calls += 1
                if fault.calls >= fault.first and (fault.last is None or fault.calls <= fault.last):
                    chosen = chosen or fault
        return chosen

    def check_nbd(self, what: str, offset: int, length: int) -> None:
        """Raise OSError if such a request is to fail."""
        for fault in self.faults:
            if fault.where == "nbd" and fault.what == what and fault.touches(offset, length):
                code: int = getattr(errno, fault.argument or "EIO")
                raise OSError(code, os.strerror(code))

    def stream(self, length: int) -> Stream | None:
        """Count data on their way out; return what is to become of them."""
        self._sent_bytes += length
        for fault in self.faults:
            if fault.where == "nbd" and fault.what == "sent" and self._sent_bytes > fault.first:
                return Stream(fault.deed)
        return None

    def capacity(self, node: str) -> int | None:
        """Return how much the file of a node may take, None for any amount."""
        found = [f for f in self.faults if f.where == "scratch" and fnmatch.fnmatchcase(node, f.what)]
        return number(found[0].argument) if found else None


def _calls(text: str, when: str) -> tuple[int, int | None]:
    if when == "*":
        return 1, None
    digits = when.removesuffix("+") or "1"
    if not re.fullmatch("[0-9]{1,9}", digits) or int(digits) < 1:
        raise BadFault(f"{text!r}: {when!r} is no call: N, N+ or * is meant")
    return int(digits), None if when.endswith("+") else int(digits)


def _range(when: str) -> tuple[int, int | None]:
    if not when:
        return 0, None
    first, dash, last = when.partition("-")
    return number(first), number(last) if dash else number(first)


def _check(text: str, found: str, known: set[str]) -> None:
    if found not in known:
        raise BadFault(f"{text!r}: {found!r} is not one of {', '.join(sorted(known))}")


def _json(text: str, argument: str) -> None:
    try:
        json.loads(argument)
    except (ValueError, RecursionError) as err:
        raise BadFault(f"{text!r}: {argument!r} is no JSON value") from err


def _seconds(text: str, argument: str) -> None:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?|\.[0-9]{1,6}", argument):
        raise BadFault(f"{text!r}: {argument!r} are no seconds")
