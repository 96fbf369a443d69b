# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a VM's disks as they are written in the configuration and on the command line.

::

    FILE[,format=raw][,backing=FILE[,format=raw]]...

A format belongs to the file before it. A comma in a path is written twice, as for QEMU.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import click

from backupctl.cli import param_types
from backupctl.errors import InvalidName, UsageError
from backupctl.names import disk_name
from backupctl.options import ImageFile, ImageFormat, VmImage

SYNTAX = "FILE[,format=raw][,backing=FILE]"
_COMMA = "\0"  # no path holds one


class _Image(click.ParamType[VmImage]):
    """DISK=FILE, where DISK is the name that the disk is stored under."""

    name = "image"

    def convert(
        self, value: str | VmImage, param: click.Parameter | None, ctx: click.Context | None
    ) -> VmImage:
        if isinstance(value, VmImage):
            return value
        disk, equals, text = value.partition("=")
        if not equals:
            self.fail(f"{value!r:.200} does not name its disk: use DISK={SYNTAX}", param, ctx)
        try:
            return parse(disk, text)
        except (UsageError, InvalidName) as err:
            self.fail(err.message, param, ctx)


IMAGE = _Image()


def parse(disk: str, text: str) -> VmImage:
    """Read the files of one disk. Raises UsageError, InvalidName."""
    files: list[ImageFile] = []
    for number, word in enumerate(_words(text)):
        key, _, value = word.partition("=") if number else ("backing", "=", word)
        if key == "backing" and value:
            files.append(ImageFile(param_types.absolute(value)))
        elif key == "format" and value in get_args(ImageFormat):
            files[-1] = ImageFile(files[-1].path, value)  # type: ignore[arg-type] # the line above narrows nothing
        else:
            raise UsageError(f"{word!r:.200} is not part of an image: use {SYNTAX}")
    return VmImage(disk_name(disk), tuple(files))


def parse_all(texts: Mapping[str, str]) -> tuple[VmImage, ...]:
    """Read the images of a VM, by the names of its disks. Raises UsageError, InvalidName."""
    return tuple(parse(disk, text) for disk, text in texts.items())


def paths(text: str) -> Iterable[Path]:
    """Yield the paths of one disk as they are written, absolute or not; for a text that `parse` reads."""
    first, *rest = _words(text)
    return [
        Path(first),
        *(Path(word.removeprefix("backing=")) for word in rest if word.startswith("backing=")),
    ]


def _words(text: str) -> list[str]:
    return [word.replace(_COMMA, ",") for word in text.replace(",,", _COMMA).split(",")]
