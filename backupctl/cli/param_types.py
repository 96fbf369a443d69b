# SPDX-License-Identifier: GPL-2.0-or-later
"""Types of option values, of the command line and of the configuration: sizes, sockets, paths, points."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from backupctl.cli import times, units
from backupctl.errors import InvalidName, UsageError
from backupctl.names import VmName, did_you_mean, vm_name
from backupctl.operations.prune import retention
from backupctl.repository import point_names
from backupctl.system import libvirt_uri
from backupctl.system.address import Address

_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}", re.ASCII)
_PERIODS = {"daily": "1d", "weekly": "1w", "monthly": "1m"}
_LIBVIRT_URI = re.compile(r"qemu(\+unix)?:///[!-~]{1,200}", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z0-9._%+=-]+(@[A-Za-z0-9.-]+)?", re.ASCII)


class _Size(click.ParamType[int]):
    """Bytes, or bytes a second, as an `int`: 100M, 1.5G, 50MiB/s."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return units.parse_size(value)
        except UsageError as err:
            self.fail(err.message, param, ctx)


class _Seconds(click.FloatRange):
    """Seconds, above 0 and no more than `most`."""

    name = "seconds"

    def __init__(self, most: float) -> None:
        super().__init__(min=0, max=most, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = super().convert(value, param, ctx)
        if math.isnan(found):  # which no comparison finds out of range
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return found


class _Duration(click.ParamType[str]):
    """A retention period such as 36h or 1y6m; stays as it is written, so that reports can repeat it."""

    name = "duration"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            retention.duration(value)
        except UsageError as err:
            self.fail(err.message, param, ctx)
        return value


class _Period(_Duration):
    """How often something is due: a duration, or one of a few words."""

    name = "period"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(_PERIODS.get(value, value), param, ctx)


class _Socket(click.ParamType[Address]):
    """A socket to connect to: unix:PATH, tcp:HOST:PORT, ssh://HOST/PATH, or a path."""

    name = "address"

    def convert(
        self, value: str | Address, param: click.Parameter | None, ctx: click.Context | None
    ) -> Address:
        if isinstance(value, Address):
            return value
        try:
            return Address.parse(value)
        except UsageError as err:
            self.fail(err.message, param, ctx)


class _LibvirtUri(click.ParamType[str]):
    """The URI of a libvirt, on this machine or on one that ssh reaches."""

    name = "uri"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if libvirt_uri.is_remote(value):
            try:
                libvirt_uri.remote(value)
            except UsageError as err:
                self.fail(err.message, param, ctx)
        elif not _LIBVIRT_URI.fullmatch(value):
            self.fail(
                f"{value!r:.120} is not a libvirt URI. Examples: qemu:///system, qemu:///session, "
                "qemu+ssh://root@vmhost/system.",
                param,
                ctx,
            )
        return value


class _AbsolutePath(click.ParamType[Path]):
    """A path; a relative one starts at the current directory, `~` is the home directory."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        try:
            return absolute(value)
        except UsageError as err:
            self.fail(err.message, param, ctx)


class _PointType(click.ParamType[str]):
    """A name of a recovery point: see `point_names`."""

    name = "point"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002 - click's signature
        try:
            return point_names.check(value)
        except InvalidName as err:
            vm = ctx.params.get("name") if ctx else None
            hint = did_you_mean(value, [point_names.LATEST])
            raise err.add(hint=hint, next_command=f"backupctl list {vm or ''}".strip()) from err


class _PointId(click.ParamType[str]):
    """The id of a recovery point, or the beginning of one: for what must not mean another point tomorrow."""

    name = "point"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not (point_names.is_id(value) or point_names.is_prefix(value)):
            self.fail(f"{value!r:.120} is not the id of a recovery point, nor its beginning.", param, ctx)
        return value


class _VmName(click.ParamType[VmName]):
    """The name of a VM."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> VmName:
        try:
            return vm_name(value)
        except InvalidName as err:
            self.fail(err.message, param, ctx)


class _Time(click.ParamType[str]):
    """A date and a time, as the name of the newest point that is not later."""

    name = "time"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return point_names.at(times.parse(value))
        except UsageError as err:
            self.fail(". ".join(text for text in (err.message, err.hint) if text), param, ctx)


def is_point(text: str) -> bool:
    """Whether a text is a name of a point."""
    try:
        return bool(point_names.check(text))
    except InvalidName:
        return False


class _Machine(click.ParamType[str]):
    """A machine type of QEMU, without properties."""

    name = "machine"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _MACHINE.fullmatch(value):
            self.fail(f"{value!r:.60} is not a machine type. Examples: q35, pc", param, ctx)
        return value


class _Url(click.ParamType[str]):
    """An http or https URL. It is a secret, so no message repeats it."""

    name = "url"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError:
            self.fail("it is not a URL", param, ctx)
        if not value.isascii() or not value.isprintable() or " " in value:
            self.fail("it is not a URL", param, ctx)
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            self.fail('it must begin with "https://" or "http://" and the name of a host', param, ctx)
        if "@" in parts.netloc or parts.fragment:
            self.fail("it must hold no user, password or fragment", param, ctx)
        return value


class _Mail(click.ParamType[str]):
    """One mail address, or several with commas between them."""

    name = "addresses"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not all(_ADDRESS.fullmatch(one.strip()) for one in value.split(",")):
            self.fail(f'{value!r:.120} is not a mail address, e.g. "root" or "a@example.org"', param, ctx)
        return value


class _Command(click.ParamType[Sequence[str]]):
    """A program, by its absolute path, and its arguments; an empty list stands for none."""

    name = "command"

    def convert(
        self, value: Sequence[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Sequence[str]:
        if value and not value[0].startswith("/"):
            self.fail(f"the program must be an absolute path, not {value[0]!r:.120}", param, ctx)
        if any("\0" in one for one in value):
            self.fail("it holds a null byte", param, ctx)
        return value


def absolute(text: str) -> Path:
    """Return a path as an absolute one. Raises UsageError.

    QEMU is told paths in JSON, so a path that is not UTF-8 would fail in the middle of a run.
    """
    try:
        found = Path(text).expanduser().absolute()
        str(found).encode()
    except RuntimeError as err:
        raise UsageError(f"cannot find the home directory in {text!r:.200}") from err
    except UnicodeEncodeError as err:
        raise UsageError(f"{text!r:.200} is not UTF-8") from err
    except OSError as err:
        raise UsageError(
            f"{text!r:.200} is relative, and the current directory cannot be found: {err.strerror}",
            next_command="cd /",
        ) from err
    if "\0" in text:
        raise UsageError(f"{text!r:.200} is not a path: it holds a null byte")
    return found


SIZE = _Size()
SECONDS = _Seconds(most=3600)
DURATION = _Duration()
PERIOD = _Period()
SOCKET = _Socket()
LIBVIRT_URI = _LibvirtUri()
PATH = _AbsolutePath()
URL = _Url()
MAIL = _Mail()
COMMAND = _Command()
MACHINE = _Machine()
POINT = _PointType()
POINT_ID = _PointId()
VM_NAME = _VmName()
TIME = _Time()
