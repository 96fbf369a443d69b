# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens during a command, for whoever watches it: one class for each thing a program may react to.

An event has fields, a stable `code`, a `severity` and one English sentence, `text`. Screens show the
text. Programs go by code and fields, because texts may be reworded.

Each command loads only the classes that it needs: a dataclass takes half a millisecond to make.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

Severity = Literal["step", "note", "warning"]
"""A step has begun; something to know, e.g. why a disk is read in full; something to act on."""


@dataclass(frozen=True)
class Event:
    """Base of all. code: stable, whatever the class or the text is called later."""

    code: ClassVar[str]

    @property
    def severity(self) -> Severity:
        """How much it matters."""
        return "note"

    @property
    def text(self) -> str:
        """What happened, as one line."""
        return self._text()

    def _text(self) -> str:
        raise NotImplementedError


class WarningEvent(Event):
    """Base of what is always a warning."""

    @property
    def severity(self) -> Severity:
        """Return "warning"."""
        return "warning"


@dataclass(frozen=True)
class StepStarted(Event):
    """A step of the command begins. step: its name; the steps of a backup are in docs/protocol.md."""

    code = "step-started"
    step: str

    @property
    def severity(self) -> Severity:
        """Return "step"."""
        return "step"

    def _text(self) -> str:
        return self.step
