# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl doctor --report`: what a report of a problem needs, in one archive, without secrets."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from backupctl.cli import crash_log, output, settings
from backupctl.cli.configuration import Config
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError
from backupctl.operations import versions
from backupctl.operations.doctor.run import Diagnosis
from backupctl.outcome import bundle, documents
from backupctl.outcome.redaction import Redaction
from backupctl.system.log import HIDDEN

_MOST_POINTS = 500
_SHORTEST_ARGUMENT = 8
_POINT_KEYS = (
    "vm",
    "point",
    "kind",
    "disks_kind",
    "parent",
    "consistency",
    "start",
    "end",
    "qemu",
    "backupctl",
)
_DISK_KEYS = (
    *("name", "kind", "parent", "size", "format", "persistent", "scanned", "reason"),
    *("dirty_bytes", "copied_bytes", "zero_bytes", "stored_bytes", "file_bytes", "unchanged_bytes"),
)
_PERSONAL = ("mail",)
_FREE_TEXTS = ("restore_test_command", "restore_test_append")
"""Settings that may contain anything, as the arguments of hooks may."""
_README = f"""\
A report about backupctl, made by `backupctl doctor --report`.

versions.json       of backupctl, Python, its packages, libnbd, Linux and QEMU's tools
configuration.json  the settings, without comments; URLs, mail addresses and the arguments of hooks are hidden
doctor.json         what `backupctl doctor` found
points.json         the newest {_MOST_POINTS} recovery points: kinds, times and sizes
logs/               the last logs of failed runs

It contains no data of any disk. Known secrets, and what looks like one, are replaced by {HIDDEN}. Names of
VMs and disks, paths and addresses of sockets are in it, since a report without them is of little use.

Read it before you send it: what a program, a path or a message contains cannot all be known beforehand.
"""


def write(path: Path, target: Target, found: Diagnosis) -> list[str]:
    """Write the archive; return the names of what is in it. Raises UsageError, Failed."""
    redaction = Redaction(secrets(target.config))
    files = {"README.txt": _README, **{name: redaction.text(text) for name, text in _logs()}}
    for name, document in _documents(target, found).items():
        files[name] = json.dumps(redaction.value(document), indent=2) + "\n"
    bundle.write(path, files)
    return sorted(files)


def tell(path: Path, names: list[str]) -> None:
    """Print what is in it, and that it is to be read before it is sent."""
    output.print_line(f"The report {path} has: {', '.join(names)}.")
    output.print_line("Secrets are taken out as far as they are known. Names and paths are in it.")
    output.print_line("Read it before you send it:")
    output.print_line(f"  tar -xzOf {path} | less")


def secrets(config: Config) -> list[str]:
    """Return the texts of a configuration that must not leave this machine."""
    found: list[str] = []
    tables: tuple[settings.File | settings.VmSettings, ...] = (config.content, *config.content.vm.values())
    for table in tables:
        for name in (*settings.SECRETS, *_PERSONAL):
            value = getattr(table.notify, name)
            found += [value, *value.split(",")] if value else []
        for name in ("before", "after", "failed"):
            found += filter(_may_be_secret, (getattr(table.hooks, name) or ())[1:])
    for place in (config.content.defaults, *config.content.vm.values()):
        found += filter(None, (getattr(place, name) for name in _FREE_TEXTS))
    return [one.strip() for text in found for one in (text, text.partition("=")[2])]


def _may_be_secret(argument: str) -> bool:
    """Whether an argument of a hook is hidden everywhere: most short ones are words such as --all."""
    return len(argument) >= _SHORTEST_ARGUMENT


def _documents(target: Target, found: Diagnosis) -> Mapping[str, object]:
    return {
        "versions.json": documents.versions(versions.components()),
        "configuration.json": _configuration(target.config),
        "doctor.json": documents.doctor(found, target.config.file),
        "points.json": _points(target),
    }


def _configuration(config: Config) -> object:
    content = msgspec.to_builtins(config.content)
    for table in (content, *content["vm"].values()):
        for name, command in table.get("hooks", {}).items():
            if isinstance(command, list | tuple):
                table["hooks"][name] = [*command[:1], *(HIDDEN for _ in command[1:])]
        for name in (*settings.SECRETS, *_PERSONAL):
            if name in table.get("notify", {}):
                table["notify"][name] = HIDDEN
    for place in (content["defaults"], *content["vm"].values()):
        place.update(dict.fromkeys(set(_FREE_TEXTS) & set(place), HIDDEN))
    return {"file": config.file, "content": content}


def _points(target: Target) -> object:
    """Return what the manifests say of the points, but for digests and names of nodes."""
    try:
        survey = target.vm_directory().scan_points(tolerant=True)
    except BackupctlError as err:
        return {"error": documents.error(err)}
    unread = [*survey.damaged, *survey.unreadable]
    return {
        "number": len(survey.points),
        "points": [_point(documents.point(one, None)) for one in survey.points[-_MOST_POINTS:]],
        "problems": [documents.error(err) for _, err in unread],
    }


def _point(document: Mapping[str, Any]) -> object:
    disks = [{key: disk[key] for key in _DISK_KEYS} for disk in document["disks"]]
    return {**{key: document[key] for key in _POINT_KEYS}, "disks": disks}


def _logs() -> Iterator[tuple[str, str]]:
    for path in crash_log.ours():
        if (text := crash_log.read(path)) is not None:
            yield f"logs/{path.name}", text
