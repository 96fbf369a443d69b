# SPDX-License-Identifier: GPL-2.0-or-later
"""How the help of a command looks: wrapped between words, with examples and exit codes at its end."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import click

NAMES = ("-h", "--help")


class Example(NamedTuple):
    """A call as it is typed, and what it is good for."""

    purpose: str
    line: str


class Formatter(click.HelpFormatter):
    """Help that is wrapped between words, and at no hyphen: `--only-changed` stays in one piece."""

    _HYPHEN = "\u2011"  # a line is not broken there; written as an ordinary hyphen

    def write(self, string: str) -> None:
        """Write what was wrapped."""
        super().write(string.replace(self._HYPHEN, "-"))

    def write_text(self, text: str) -> None:
        """Write a paragraph."""
        super().write_text(text.replace("-", self._HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write options or commands, each with its text."""
        kept = [(name, text.replace("-", self._HYPHEN)) for name, text in rows]
        super().write_dl(kept, col_max, col_spacing)

    def write_whole(self, line: str) -> None:
        """Write a line that is to be copied, so it is never wrapped."""
        self.write(f"{'':>{self.current_indent}}{line}\n")


click.Context.formatter_class = Formatter


class Documented(click.Command):
    """A command whose help ends with examples and exit codes, which manual pages need apart as well.

    exit_codes: each with its meaning.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Iterable[tuple[str, str]] = (),
        exit_codes: Mapping[int, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self.examples = tuple(Example(*one) for one in examples)
        self.exit_codes = dict(exit_codes or {})

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what follows the options."""
        super().format_epilog(ctx, formatter)
        assert isinstance(formatter, Formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write_text(f"{example.purpose}:")
                    with formatter.indentation():
                        formatter.write_whole(example.line)
        if self.exit_codes:
            with formatter.section("Exit codes"):
                formatter.write_dl([(f"{code:<2}", text) for code, text in self.exit_codes.items()])


class Group(Documented, click.Group):
    """A group of commands, each listed with the whole first sentence of its help.

    sections: the names of commands below each heading; without any, all below one.
    """

    def __init__(
        self, *arguments: Any, sections: Mapping[str, Iterable[str]] | None = None, **more: Any
    ) -> None:
        super().__init__(*arguments, **more)
        self.sections = {heading: tuple(names) for heading, names in (sections or {}).items()}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command, wrapped where click would cut its text."""
        sections = self.sections or {"Commands": tuple(self.list_commands(ctx))}
        width = max(map(len, self.list_commands(ctx)), default=0)
        for heading, names in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), self._summary(ctx, name)) for name in names])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is named, or say which may have been meant, of those not loaded as well."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as err:
            known = self.list_commands(ctx)
            raise click.exceptions.NoSuchCommand(err.command_name, possibilities=known, ctx=ctx) from None

    def _summary(self, ctx: click.Context, name: str) -> str:
        found = self.get_command(ctx, name)
        assert found is not None
        return found.get_short_help_str(limit=1000)
