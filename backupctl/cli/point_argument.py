# SPDX-License-Identifier: GPL-2.0-or-later
"""The argument POINT of a command, and `--at` in its place."""

import functools
from collections.abc import Callable
from typing import Any

import click

from backupctl.cli import (
    completion,
    param_types,
)
from backupctl.cli.common import Declared
from backupctl.errors import (
    UsageError,
)


def at_option(text: str) -> Callable[[Declared], Declared]:
    """Give a command `--at`. text: which point it stands for."""
    return click.option(
        "--at",
        type=param_types.TIME,
        metavar='"DATE TIME"',
        help=f"{text}, in local time unless it names UTC or an offset.",
    )


def point_argument(name: str, *, required: bool) -> Callable[[Declared], Declared]:
    """Give a command the argument for a point, without `--at`."""
    return click.argument(
        name, type=param_types.POINT, default=None, required=required, shell_complete=completion.points
    )


def point(
    name: str = "point", *, default: str | None = None, optional: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command a POINT, or instead of it `--at`. default: what is meant without either."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, at: str | None, **given: Any) -> Any:
            given[name] = point_or_time(given[name], at) or default
            if given[name] is None and not optional:
                raise _missing_argument(name)
            return function(*arguments, **given)

        option = at_option(f"In place of {name.upper()}: the newest point not later than this")
        return point_argument(name, required=False)(option(call))

    return decorate


def point_or_time(point: str | None, at: str | None) -> str | None:
    """Return the point that was named in one of two ways. Raises UsageError if it was in both."""
    if point and at:
        raise UsageError("a point and --at are mutually exclusive")
    return point or at


def point_then_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `[POINT] [PATH]...`, and `--at`; it is called with `point` and `paths`.

    A PATH begins with a slash, so POINT may be left out: it is then `latest`.
    """

    @functools.wraps(command)
    def call(*arguments: Any, words: tuple[str, ...], at: str | None, **given: Any) -> Any:
        named, paths = (None, words) if not words or words[0].startswith("/") else (words[0], words[1:])
        checked = (
            None if named is None else param_types.POINT.convert(named, None, click.get_current_context())
        )
        return command(*arguments, point=point_or_time(checked, at) or "latest", paths=paths, **given)

    option = at_option("In place of POINT: the newest point not later than this")
    words = click.argument("words", metavar="[POINT] [PATH]...", nargs=-1, shell_complete=completion.points)
    return words(option(call))


def _missing_argument(name: str) -> click.MissingParameter:
    context = click.get_current_context()
    return click.MissingParameter(ctx=context, param_hint=f"'{name.upper()}'", param_type="argument")
