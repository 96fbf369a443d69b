# SPDX-License-Identifier: GPL-2.0-or-later
"""Every mistake in a configuration file at once, each with its line.

A key that is not known is an error: a misspelt `limit` must not silently mean no limit. So is a path that
depends on where backupctl is started, and what would lead two VMs, or two disks, into one directory.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import msgspec
from msgspec import Meta

from backupctl.cli import image_texts, param_types, settings
from backupctl.cli.toml_lines import Key, key_lines
from backupctl.errors import InvalidName, UsageError
from backupctl.names import did_you_mean, disk_name, vm_name
from backupctl.system.address import Address

_PATHS = (
    *("repository", "scratch", "sendmail", "textfile", "state"),
    *("restore_test_firmware", "restore_test_kernel", "restore_test_initrd"),
)
_PATH_LISTS = ("include_files",)
_SOCKETS = ("qmp", "agent")
_VM_TABLES = ("disks", "image", *settings.TABLES)
_TEXT_TYPES: Mapping[str, click.ParamType[Any]] = {
    "repository": param_types.PATH,
    "scratch": param_types.PATH,
    "scratch_size": param_types.SIZE,
    "limit": param_types.SIZE,
    "keep_within": param_types.DURATION,
    "max_age": param_types.DURATION,
    "warn_age": param_types.DURATION,
    "repeat": param_types.DURATION,
    "mail": param_types.MAIL,
    "webhook": param_types.URL,
    "ntfy": param_types.URL,
    "healthchecks": param_types.URL,
    "before": param_types.COMMAND,
    "after": param_types.COMMAND,
    "failed": param_types.COMMAND,
    "full_every": param_types.DURATION,
    "restore_test": param_types.PERIOD,
    "restore_test_machine": param_types.MACHINE,
    "restore_test_memory": param_types.SIZE,
    "restore_test_firmware": param_types.PATH,
    "restore_test_kernel": param_types.PATH,
    "restore_test_initrd": param_types.PATH,
    "qmp": param_types.SOCKET,
    "agent": param_types.SOCKET,
    "libvirt": param_types.LIBVIRT_URI,
}
"""What the text of a key must say: the type of the option of that name, if there is one."""


@dataclass(frozen=True, order=True)
class Mistake:
    """One mistake in a file. line: from 1; 0 where there is no line to name."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


class _Check:
    """A walk through a file's content that gathers what is wrong, each with the key where it stands."""

    def __init__(self) -> None:
        self.found: list[tuple[Key, str]] = []

    def file(self, content: dict[str, Any]) -> settings.File:
        """Return what is right of a file's content."""
        self._known(content, (), _fields(settings.File), "at the top level")
        defaults = self._table(content.get("defaults", {}), ("defaults",))
        run = self._table(content.get("run", {}), ("run",))
        vms = self._table(content.get("vm", {}), ("vm",))
        kept = {name: self._vm(name, self._table(value, ("vm", name))) for name, value in vms.items()}
        whole = settings.File(
            defaults=settings.Settings(**self._values(defaults, ("defaults",), settings.Settings)),
            run=settings.RunSettings(**self._values(run, ("run",), settings.RunSettings)),
            vm=kept,
            metrics=self._of(content, (), "metrics", settings.MetricsSettings),
            **{name: self._of(content, (), name, model) for name, model in settings.TABLES.items()},
        )
        self._shared(whole)
        return whole

    def _vm(self, name: str, table: dict[str, Any]) -> settings.VmSettings:
        key = ("vm", name)
        try:
            vm_name(name)
        except InvalidName as err:
            self._add(key, f"{_where(key)}: {err.message}")
        found = settings.VmSettings(
            **self._values(
                {one: table[one] for one in table if one not in _VM_TABLES}, key, settings.VmSettings
            ),
            disks=self._disks(self._table(table.get("disks", {}), (*key, "disks")), (*key, "disks")),
            image=self._images(self._table(table.get("image", {}), (*key, "image")), (*key, "image")),
            **{one: self._of(table, key, one, model) for one, model in settings.TABLES.items()},
        )
        for other in ("qmp", "agent") if found.libvirt else ():
            if getattr(found, other):
                said = f"libvirt and {other} in {_where(key)} cannot be used together"
                self._add((*key, other), said)
        if found.domain and not found.libvirt:
            self._add((*key, "domain"), f"domain in {_where(key)} needs libvirt")
        for socket in _SOCKETS:
            address = getattr(found, socket)
            path = Address.parse(address).path if address else None
            if path and not Path(path).is_absolute():
                self._add(
                    (*key, socket), f"{socket} in {_where(key)} must be an absolute path, not {path!r:.120}"
                )
        return found

    def _disks(self, disks: dict[str, Any], key: Key) -> dict[str, str]:
        kept: dict[str, str] = {}
        for disk, stored in disks.items():
            try:
                name = disk_name(stored if isinstance(stored, str) else "")
            except InvalidName as err:
                self._add((*key, disk), f"{disk} in {_where(key)}: {err.message}")
                continue
            if other := next((one for one in kept if kept[one] == name), None):
                self._add(
                    (*key, disk), f"{other} and {disk} in {_where(key)} cannot both be stored as {name!r}"
                )
            kept[disk] = name
        return kept

    def _images(self, images: dict[str, Any], key: Key) -> dict[str, str]:
        kept: dict[str, str] = {}
        for disk, files in images.items():
            text = files if isinstance(files, str) else ""
            try:
                image_texts.parse(disk, text)
            except (InvalidName, UsageError) as err:
                self._add((*key, disk), f"{disk} in {_where(key)}: {err.message}")
                continue
            if relative := [path for path in image_texts.paths(text) if not path.expanduser().is_absolute()]:
                what = f"must name absolute paths, not {str(relative[0])!r:.120}"
                self._add((*key, disk), f"{disk} in {_where(key)} {what}")
                continue
            kept[disk] = text
        return kept

    def _of(self, content: dict[str, Any], key: Key, name: str, model: type[msgspec.Struct]) -> Any:
        """Return what is right of a table inside another one."""
        inner = (*key, name)
        return model(**self._values(self._table(content.get(name, {}), inner), inner, model))

    def _values(self, table: dict[str, Any], key: Key, model: type[msgspec.Struct]) -> dict[str, Any]:
        """Return the right values of a table."""
        fields = _fields(model)
        self._known(table, key, fields, f"in {_where(key)}")
        return {
            name: value
            for name, value in table.items()
            if name in fields and self._is_right(name, value, key, fields[name])
        }

    def _is_right(self, name: str, value: Any, key: Key, kind: Any) -> bool:
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            self._add((*key, name), f"{name} in {_where(key)} must be {_expected(kind)}")
            return False
        paths = [value] if name in _PATHS else value if name in _PATH_LISTS else ()
        for path in paths:
            if not Path(path).is_absolute() and not path.startswith("~"):
                self._add(
                    (*key, name),
                    f"{name} in {_where(key)} must be an absolute path, not {path!r:.120}: "
                    "it must not depend on where backupctl is started",
                )
                return False
        try:
            _TEXT_TYPES[name].convert(value, None, None) if name in _TEXT_TYPES else None
            for path in paths:
                param_types.PATH.convert(path, None, None)
        except click.BadParameter as err:
            self._add((*key, name), f"{name} in {_where(key)}: {err.message}")
            return False
        return True

    def _known(self, table: dict[str, Any], key: Key, known: Iterable[str], where: str) -> None:
        for name in table:
            if name not in known:
                self._add((*key, name), f"unknown key {name!r:.60} {where}{_suggestion(name, key, known)}")

    def _table(self, value: object, key: Key) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self._add(key, f"{_where(key)} must be a table")
        return {}

    def _shared(self, whole: settings.File) -> None:
        """Refuse two VMs of one repository with the same monitor, or the same agent.

        One VM that is backed up to two repositories is two VMs of the file, with one monitor.
        """
        seen: dict[tuple[str, str, str], str] = {}
        for name, vm in whole.vm.items():
            repository = vm.repository or whole.defaults.repository or ""
            for socket in _SOCKETS:
                if address := getattr(vm, socket):
                    spelt = str(Address.parse(address))
                    place = (socket, os.path.normpath(spelt), os.path.normpath(repository))
                    if (other := seen.setdefault(place, name)) != name:
                        said = f"[vm.{other}] and [vm.{name}] have the same {socket}, {spelt:.200}"
                        self._add(("vm", name, socket), said)
            if vm.libvirt:
                domain = vm.domain or name
                place = (vm.libvirt, domain, os.path.normpath(repository))
                if (other := seen.setdefault(place, name)) != name:
                    said = f"[vm.{other}] and [vm.{name}] have the same domain of libvirt, {domain:.200}"
                    self._add(("vm", name, "libvirt"), said)

    def _add(self, key: Key, message: str) -> None:
        self.found.append((key, message))


def check(content: dict[str, Any], text: str) -> tuple[settings.File, list[Mistake]]:
    """Return what is right of a file's content, and all mistakes by their lines. text: the file's."""
    walk = _Check()
    found = walk.file(content)
    lines = key_lines(text) if walk.found else {}
    return found, sorted(Mistake(_line(lines, key), message) for key, message in walk.found)


def _line(lines: Mapping[Key, int], key: Key) -> int:
    """Return the line of a key, or of the nearest table around it."""
    return next((lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in lines), 0)


def _fields(model: type[msgspec.Struct]) -> dict[str, Any]:
    return {one.name: one.type for one in msgspec.structs.fields(model)}


def _where(key: Key) -> str:
    return f"[{'.'.join(key):.200}]"


def _expected(kind: Any) -> str:
    """Say what a field must be: one of its choices, or what its type's description says."""
    for part in _parts(kind):
        if get_origin(part) is Literal:
            return f"one of: {', '.join(get_args(part))}"
        if isinstance(part, Meta) and part.description:
            return part.description
    raise AssertionError(kind)  # a test asks every field


def _parts(kind: Any) -> Iterator[Any]:
    yield kind
    for part in (*get_args(kind), *getattr(kind, "__metadata__", ())):
        yield from _parts(part)


def _suggestion(name: str, key: Key, known: Iterable[str]) -> str:
    if key == ("defaults",) and name in settings.settable():
        return "; it belongs in [vm.NAME]"
    if name in settings.settable_for_run():
        return "; it belongs in [run]"
    return f"; {did_you_mean(name, known) or 'known keys: ' + ', '.join(sorted(known))}"
