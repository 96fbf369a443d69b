# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults to inject: one small language for the command line, the control socket, tests and drills.

::

    qmp:COMMAND[@WHEN]=ACTION[:ARGUMENT]     a monitor command          COMMAND may contain * and ?
    agent:COMMAND[@WHEN]=ACTION[:ARGUMENT]   a guest agent's command
        WHEN   N the Nth call (default 1) · N+ from the Nth on · * each
        ACTION error[:TEXT]      answer an error, do nothing
               error-after[:TEXT]        do it, answer an error
               answer:VALUE      do nothing, answer this JSON value
               late:SECONDS      do it, answer later
               silent            do nothing, never answer
               unanswered        do it, never answer
               garbage           do nothing, answer invalid JSON
               hangup            do nothing, close the connection
               lost              do it, close the connection without an answer
               kill, kill-after  die as by SIGKILL, before or after doing it
               quit, quit-after  end cleanly, before or after doing it
               crash, crash-after        die and start again, with bitmaps as QEMU leaves them
               restart, restart-after    end cleanly and start again
    nbd:sent@BYTES=drop|stall|short|garbage  when this many bytes of data have been sent in total
    nbd:read@FIRST-LAST=error[:ERRNO]        reads that overlap these bytes of a disk (default EIO)
    nbd:status@FIRST-LAST=error[:ERRNO]      block status queries of these bytes
    scratch:NODE=full:BYTES                  the files of these nodes are full at this size; NODE may contain
                                             * and ?

Numbers take k, M, G, T (powers of 1024).
"""

import errno
import fnmatch
import json
import os
import re
from dataclasses import asdict, dataclass
from enum import Enum

PLAIN = ("silent", "unanswered", "garbage", "hangup", "lost")
TERMINATIONS = ("kill", "quit", "crash", "restart")
ACTIONS = {
    "error",
    "error-after",
    "answer",
    "late",
    *PLAIN,
    *TERMINATIONS,
    *(f"{end}-after" for end in TERMINATIONS),
}
_SPEC = re.compile(
    r"(qmp|agent|nbd|scratch):([A-Za-z0-9_*?#.-]+)(?:@([^=]+))?=([a-z-]+)(?::(.*))?", re.DOTALL
)
_NUMBER = re.compile(r"([0-9]{1,18})([kMGT]?)")
_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class BadFault(ValueError):
    """A text is not a valid fault."""


class Stream(Enum):
    """What happens to data on the way to an NBD client."""

    DROP = "drop"
    STALL = "stall"
    SHORT = "short"
    GARBAGE = "garbage"


@dataclass
class Fault:
    """One fault.

    where: qmp, agent, nbd or scratch. what: the command, kind of NBD traffic, or node; may be a pattern.
    first, last: calls counted from 1, or bytes; last is None for no end. calls: matching calls so far.
    """

    text: str
    where: str
    what: str
    first: int
    last: int | None
    action: str
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

    def document(self) -> dict[str, object]:
        """Return it as the control socket shows it, where the action is called "deed"."""
        found = asdict(self)
        return found | {"deed": found.pop("action")}

    def touches(self, offset: int, length: int) -> bool:
        """Whether a range of bytes overlaps the fault's."""
        return offset + length > self.first and (self.last is None or offset <= self.last)


def parse(text: str) -> Fault:
    """Parse one fault. Raises BadFault."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise BadFault(f"invalid fault {text!r}; expected WHERE:WHAT[@WHEN]=ACTION[:ARGUMENT]")
    where, what, when, action, argument = match[1], match[2], match[3] or "", match[4], match[5] or ""
    if where in ("qmp", "agent"):
        first, last = _calls(text, when)
        _check(text, action, ACTIONS)
        if action == "late":
            _seconds(text, argument)
        if action == "answer":
            _json(text, argument)
    elif where == "scratch":
        first, last = 0, None
        _check(text, action, {"full"})
        number(argument)
    elif what == "sent":
        first, last = number(when), None
        _check(text, action, {each.value for each in Stream})
    else:
        _check(text, what, {"read", "status"})
        _check(text, action, {"error"})
        first, last = _range(when)
        if argument and argument not in errno.errorcode.values():
            raise BadFault(f"invalid fault {text!r}: unknown errno {argument!r}")
    return Fault(text, where, what, first, last, action, argument)


def number(text: str) -> int:
    """Parse a number of bytes with an optional unit. Raises BadFault."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BadFault(f"invalid number of bytes {text!r}")
    return int(match[1]) * _UNITS[match[2]]


class Faults:
    """The active faults, and the counters that they need."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._sent_bytes = 0

    def add(self, text: str) -> Fault:
        """Activate a fault; calls and bytes are counted from now on. Raises BadFault."""
        fault = parse(text)
        self.faults.append(fault)
        if fault.what == "sent":
            fault.first += self._sent_bytes
        return fault

    def clear(self) -> None:
        """Remove all faults."""
        self.faults = []

    def command(self, where: str, name: str) -> Fault | None:
        """Count a call of a command; return the fault to apply, if any."""
        chosen = None
        for fault in self.faults:
            if fault.where == where and fnmatch.fnmatchcase(name, fault.what):
                fault.calls += 1
                if fault.calls >= fault.first and (fault.last is None or fault.calls <= fault.last):
                    chosen = chosen or fault
        return chosen

    def check_nbd(self, what: str, offset: int, length: int) -> None:
        """Raise OSError if a fault makes this request fail."""
        for fault in self.faults:
            if fault.where == "nbd" and fault.what == what and fault.touches(offset, length):
                code: int = getattr(errno, fault.argument or "EIO")
                raise OSError(code, os.strerror(code))

    def stream(self, length: int) -> Stream | None:
        """Count data about to be sent; return what happens to them, None if they are sent."""
        self._sent_bytes += length
        for fault in self.faults:
            if fault.where == "nbd" and fault.what == "sent" and self._sent_bytes > fault.first:
                return Stream(fault.action)
        return None

    def capacity(self, node: str) -> int | None:
        """Return how many bytes the file of a node may take, None for no limit."""
        found = [f for f in self.faults if f.where == "scratch" and fnmatch.fnmatchcase(node, f.what)]
        return number(found[0].argument) if found else None


def _calls(text: str, when: str) -> tuple[int, int | None]:
    if when == "*":
        return 1, None
    digits = when.removesuffix("+") or "1"
    if not re.fullmatch("[0-9]{1,9}", digits) or int(digits) < 1:
        raise BadFault(f"invalid fault {text!r}: {when!r} is not a call; expected N, N+ or *")
    return int(digits), None if when.endswith("+") else int(digits)


def _range(when: str) -> tuple[int, int | None]:
    if not when:
        return 0, None
    first, dash, last = when.partition("-")
    return number(first), number(last) if dash else number(first)


def _check(text: str, found: str, known: set[str]) -> None:
    if found not in known:
        raise BadFault(f"invalid fault {text!r}: {found!r} is not one of {', '.join(sorted(known))}")


def _json(text: str, argument: str) -> None:
    try:
        json.loads(argument)
    except (ValueError, RecursionError) as err:
        raise BadFault(f"invalid fault {text!r}: {argument!r} is not a JSON value") from err


def _seconds(text: str, argument: str) -> None:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?|\.[0-9]{1,6}", argument):
        raise BadFault(f"invalid fault {text!r}: {argument!r} is not a number of seconds")
