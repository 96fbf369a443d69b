# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU tells of a VM: `qemu.json`, from which a VM without libvirt is rebuilt.

The commands are of qapi/machine.json, qapi/misc.json, qapi/block.json and qapi/char.json. One that this QEMU
does not have, or refuses, leaves its part out.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from backupctl.errors import CommandFailed
from backupctl.vm.definition import Definition, DefinitionFile
from backupctl.vm.qmp import command_line
from backupctl.vm.qmp.monitor import Monitor

FORMAT = 1
FILE_NAME = "qemu.json"
_MOST_BYTES = 1 << 20
_MOST_ITEMS = 1000
_MOST_TEXT = 4096
_MOST_NUMBER = 1 << 63


@dataclass(frozen=True)
class _Question:
    """A part of the document. reduce: makes it of QEMU's answer, or raises LookupError, TypeError."""

    part: str
    command: str
    reduce: Callable[[Any], Any]
    arguments: dict[str, object] | None = None


def definition(monitor: Monitor, arguments: Sequence[str] | None) -> Definition:
    """Ask QEMU what it is. arguments: its command line, None if it is not known.

    Raises MonitorError if the monitor is lost, and not if QEMU refuses a question.
    """
    document: dict[str, Any] = {"format": FORMAT, "qemu": str(monitor.version)}
    omitted = []
    for question in _QUESTIONS:
        try:
            document[question.part] = _asked(monitor, question)
        except CommandFailed as err:
            document[question.part] = None
            omitted.append(f"{question.part}: {err.description:.200}")
        except (LookupError, TypeError, ValueError, AttributeError):
            document[question.part] = None
            omitted.append(f"{question.part}: the answer to {question.command} is invalid")
    told = None if arguments is None else command_line.without_secrets(arguments)
    document["command_line"] = told
    document["secrets_hidden"] = told is not None and told != tuple(arguments or ())
    document["omitted"] = omitted
    content = (json.dumps(document, indent=2, ensure_ascii=True) + "\n").encode()
    if len(content) > _MOST_BYTES:
        return Definition(omitted=(f"what QEMU tells of the VM is larger than {_MOST_BYTES >> 10} KiB",))
    return Definition((DefinitionFile("qemu", FILE_NAME, "", content),))


def _asked(monitor: Monitor, question: _Question) -> Any:
    if question.command not in monitor.commands:
        raise CommandFailed(question.command, "CommandNotFound", "this QEMU does not have the command")
    return question.reduce(monitor.execute(question.command, question.arguments))


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise TypeError("not a text")
    return command_line.clean(value)


def _number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < _MOST_NUMBER:
        raise TypeError("not a number")
    return int(value)


def _several(value: object, reduce: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ITEMS:
        raise TypeError("not a list")
    return [reduce(one) for one in value]


def _block(device: Any) -> dict[str, Any]:
    inserted = device.get("inserted") or {}
    image = inserted.get("image") or {}
    return {
        "device": _text(device.get("device", "")),
        "qdev": _text(device.get("qdev", "")),
        "node": _text(inserted.get("node-name", "")),
        "driver": _text(inserted.get("drv", "")),
        "file": _text(inserted.get("file", "")),
        "read_only": bool(inserted.get("ro", False)),
        "size": _number(image.get("virtual-size", 0)),
    }


def _named(entry: Any) -> dict[str, str]:
    return {"name": _text(entry["name"]), "type": _text(entry["type"])}


def _devices(answer: Any) -> list[Any]:
    found = _several(answer, _named)
    return [one for one in found if one["type"].startswith("child<")]


_QUESTIONS = (
    _Question("name", "query-name", lambda answer: _text(answer.get("name", ""))),
    _Question("uuid", "query-uuid", lambda answer: _text(answer["UUID"])),
    _Question("target", "query-target", lambda answer: _text(answer["arch"])),
    _Question("machine", "qom-get", _text, {"path": "/machine", "property": "type"}),
    _Question("kvm", "query-kvm", lambda answer: bool(answer["enabled"])),
    _Question(
        "memory_bytes",
        "query-memory-size-summary",
        lambda answer: _number(answer["base-memory"]) + _number(answer.get("plugged-memory", 0)),
    ),
    _Question(
        "cpus",
        "query-cpus-fast",
        lambda answer: len(_several(answer, lambda one: _number(one["cpu-index"]))),
    ),
    _Question("devices", "qom-list", _devices, {"path": "/machine/peripheral"}),
    _Question("other_devices", "qom-list", _devices, {"path": "/machine/peripheral-anon"}),
    _Question("block", "query-block", lambda answer: _several(answer, _block)),
    _Question(
        "chardevs",
        "query-chardev",
        lambda answer: _several(
            answer, lambda one: {"label": _text(one["label"]), "to": _text(one["filename"])}
        ),
    ),
)
