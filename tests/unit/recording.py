# SPDX-License-Identifier: GPL-2.0-or-later
"""A Reporter that keeps what it is told."""

from backupctl.events import Event
from backupctl.progress import Silent


class Recording(Silent):
    """events: all of them, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    @property
    def warnings(self) -> list[Event]:
        return [one for one in self.events if one.severity == "warning"]

    @property
    def notes(self) -> list[Event]:
        return [one for one in self.events if one.severity == "note"]
