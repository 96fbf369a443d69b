# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines of documents and units, parsed as click does."""

import click

from backupctl.cli.main import cli


def parse(words: list[str]) -> None:
    """Parse a command line that follows the program's name, and call nothing. Raises UsageError."""
    context = cli.make_context("backupctl", words)
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)
