# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs a command line names: one, several, patterns, or all."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.names import VmName, vm_name

_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Selection:
    """The words that were typed for NAME, and --all. A pattern is one of the shell: `web*`, `db[12]`."""

    words: tuple[str, ...] = ()
    everything: bool = False

    @property
    def one(self) -> VmName | None:
        """The only VM, if exactly one was named and not by a pattern: then the command is about that one.

        Raises InvalidName.
        """
        if self.everything or len(self.words) != 1 or is_pattern(self.words[0]):
            return None
        return vm_name(self.words[0])

    @property
    def is_empty(self) -> bool:
        """Whether nothing was named at all."""
        return not self.words and not self.everything

    def check(self) -> None:
        """Raise UsageError for names beside --all."""
        if self.everything and self.words:
            raise UsageError("--all means every VM, so no NAME may stand beside it", state=UNTOUCHED)

    def of(self, known: Sequence[str]) -> tuple[VmName, ...]:
        """Return the VMs, each once, in the order in which they were named.

        known: all that there are. Raises UsageError for a pattern that none of them matches, InvalidName.
        """
        self.check()
        found: list[str] = list(known) if self.everything else []
        for word in self.words:
            found += self._matching(word, known) if is_pattern(word) else [word]
        return tuple(vm_name(one) for one in dict.fromkeys(found))

    @staticmethod
    def _matching(pattern: str, known: Sequence[str]) -> list[str]:
        found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UsageError(
                f"no VM matches {pattern!r:.120} (VMs: {', '.join(sorted(known)) or 'none'})", state=UNTOUCHED
            )
        return found


def is_pattern(word: str) -> bool:
    """Whether a word is a pattern; no VM's name has one of its characters."""
    return not _WILD.isdisjoint(word)
