# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds for one call of the program: carried by click's context, as its `obj`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Self

import click
from click.core import ParameterSource

from backupctl.cli import configuration
from backupctl.cli.configuration import Config
from backupctl.cli.selection import Selection


@dataclass
class Invocation:
    """One call.

    words: the command line. as_json: whether the outcome is to be a document; it is read off the words,
    because an error in the words themselves must be a document as well. typed: the command's parameters, as
    typed.
    config_path: the configuration file that is named. config_source: what names it. selection: the VMs that
    are named. only: the one of them for which a command is called that is called for each.
    """

    words: Sequence[str] = ()
    as_json: bool = field(init=False)
    typed: Mapping[str, Any] = field(default_factory=dict)
    config_path: str | None = None
    config_source: ParameterSource = ParameterSource.DEFAULT
    selection: Selection = field(default_factory=Selection)
    only: Selection | None = None

    def __post_init__(self) -> None:
        self.as_json = "--json" in takewhile(lambda word: word != "--", self.words)

    @classmethod
    def of(cls, context: click.Context) -> Self:
        """Return what the context carries."""
        found = context.find_root().obj
        assert isinstance(found, cls)  # the group's make_context puts it there
        return found

    def note_typed(self, typed: Mapping[str, Any]) -> None:
        """Note the parameters of the command, before any of them is looked at."""
        self.typed = typed
        if given := typed.get("config"):
            self.config_path, self.config_source = given, ParameterSource.COMMANDLINE

    @cached_property
    def config(self) -> Config:
        """Read the configuration, once. Raises UsageError."""
        return configuration.load(self.config_path)
