# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a VM's disks as they are written in the configuration and on the command line.

::

    [ssh://[USER@]HOST[:PORT]]FILE[,format=raw][,backing=FILE[,format=raw]]...

A format belongs to the file before it. A comma in a path is written twice, as for QEMU. All files of a disk
are on the host that its first one names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import click

from backupctl.cli import param_types
from backupctl.errors import InvalidName, UsageError
from backupctl.names import disk_name
from backupctl.options import ImageFile, ImageFormat, VmImage
from backupctl.system.address import Address

SYNTAX = "FILE[,format=raw][,backing=FILE]"
_COMMA = "\0"  # no path holds one
_SSH = "ssh://"
_ANY_PATH = "/image"
"""An address has one; that of an image's host is not used."""


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
    host, text = split_host(text)
    files: list[ImageFile] = []
    for number, word in enumerate(_words(text)):
        key, _, value = word.partition("=") if number else ("backing", "=", word)
        if key == "backing" and value:
            files.append(ImageFile(_path(value, host)))
        elif key == "format" and value in get_args(ImageFormat):
            files[-1] = ImageFile(files[-1].path, value)  # type: ignore[arg-type] # the line above narrows nothing
        else:
            raise UsageError(f"{word!r:.200} is not part of an image: use {SYNTAX}")
    return VmImage(disk_name(disk), tuple(files), host)


def parse_all(texts: Mapping[str, str]) -> tuple[VmImage, ...]:
    """Read the images of a VM, by the names of its disks. Raises UsageError, InvalidName."""
    return tuple(parse(disk, text) for disk, text in texts.items())


def paths(text: str) -> Iterable[Path]:
    """Yield the paths of one disk as they are written, absolute or not; for a text that `parse` reads."""
    first, *rest = _words(split_host(text)[1])
    return [
        Path(first),
        *(Path(word.removeprefix("backing=")) for word in rest if word.startswith("backing=")),
    ]


def split_host(text: str) -> tuple[Address | None, str]:
    """Return the host that a text begins with, and the rest. Raises UsageError."""
    if not text.startswith(_SSH):
        return None, text
    place, slash, rest = text.removeprefix(_SSH).partition("/")
    try:
        return Address.parse(f"{_SSH}{place}{_ANY_PATH}"), slash + rest
    except UsageError as err:
        raise UsageError(f"invalid image {text!r:.200}: use ssh://[USER@]HOST[:PORT]{SYNTAX}") from err


def _path(text: str, host: Address | None) -> Path:
    if host is None:
        return param_types.absolute(text)
    path = Path(text)
    if not path.is_absolute():
        raise UsageError(f"{text!r:.200} is on {host.host}, so it needs an absolute path")
    return path


def _words(text: str) -> list[str]:
    return [word.replace(_COMMA, ",") for word in text.replace(",,", _COMMA).split(",")]
