# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: how a test steers the simulator, one JSON object a line each way.

``{"do": NAME, …}`` is answered by ``{"return": …}`` or ``{"error": TEXT}``. `docs/simulator.md` has the list.
"""

import base64
import binascii
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backupctl.simulator import guest
from backupctl.simulator.channel import Channel, ListeningSocket
from backupctl.simulator.failure import CommandError
from backupctl.simulator.faults import BadFault
from backupctl.simulator.machine import Machine

Given = dict[str, Any]


class Control:
    """The control socket of the machine that runs now (a restart makes a new one)."""

    def __init__(self, path: Path, machine: Callable[[], Machine]) -> None:
        self._machine = machine
        self.listener = ListeningSocket(path, self._serve, many=True)
        self._orders: dict[str, Callable[[Given], Any]] = {
            "write": self._write,
            "zero": lambda given: self._change("zero", given),
            "discard": lambda given: self._change("discard", given),
            "copy": self._copy,
            "freeze": self._freeze,
            "moment": self._moment,
            "workload": self._workload,
            "step": self._step,
            "journal": lambda _: self._machine().guest.tell_journal(),
            "status": lambda _: self._status(),
            "fault": lambda given: self._machine().faults.add(str(given["spec"])).document(),
            "faults": lambda _: [fault.document() for fault in self._machine().faults.faults],
            "clear-faults": lambda _: self._machine().faults.clear(),
            "end": self._end,
        }

    async def _serve(self, channel: Channel) -> None:
        text = b""
        while True:
            data, _ = await channel.receive()
            text += data
            while b"\n" in text:
                line, _, text = text.partition(b"\n")
                channel.post(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            given = json.loads(line)
            return {"return": self._orders[given["do"]](given)}
        except KeyError as err:
            return {"error": f"unknown or missing: {err}"}
        except (ValueError, TypeError, CommandError, BadFault, OSError) as err:
            return {"error": str(err)}

    def _write(self, given: Given) -> None:
        if "data" in given:
            try:
                data = base64.b64decode(given["data"], validate=True)
            except binascii.Error as err:
                raise CommandError(f"data are not valid base64: {err}") from err
        else:
            data = bytes([given["pattern"]]) * given["length"]
        self._change("write", given | {"length": len(data)}, data)

    def _change(self, what: str, given: Given, data: bytes | None = None) -> None:
        vm = self._machine()
        if vm.guest.frozen:
            raise CommandError("the guest is frozen")
        error = vm.guest.change(given["disk"], what, given["offset"], given["length"], data)
        if error:
            raise CommandError(error)

    def _copy(self, given: Given) -> None:
        guest.copy_out(self._machine().top(given["disk"]), Path(given["to"]))

    def _freeze(self, given: Given) -> None:
        self._machine().guest.frozen = bool(given["frozen"])

    def _moment(self, _given: Given) -> dict[str, Any] | None:
        moment = self._machine().moment
        if moment is None:
            return None
        files = {name: str(path) for name, path in moment.disks.items()}
        return {"number": moment.number, "at": moment.at, "disks": files}

    def _workload(self, given: Given) -> None:
        if given["per-second"]:
            self._machine().guest.start(given["per-second"], given.get("span"))
        else:
            self._machine().guest.stop()

    def _step(self, given: Given) -> None:
        if self._machine().guest.frozen:
            raise CommandError("the guest is frozen")
        for _ in range(given.get("count", 1)):
            self._machine().guest.step(given.get("span"))

    def _status(self) -> dict[str, Any]:
        vm = self._machine()
        status: dict[str, Any] = {
            "running": vm.running,
            "frozen": vm.guest.frozen,
            "working": vm.guest.working,
        }
        status |= {"writes": len(vm.guest.journal), "freezes": vm.guest.freezes, "thaws": vm.guest.thaws}
        return status | {"failed-writes": vm.guest.failed_writes, "nbd-clients": vm.nbd_clients}

    def _end(self, given: Given) -> None:
        if given["how"] not in ("kill", "quit", "crash", "restart"):
            raise CommandError(f"unknown end {given['how']!r}; expected kill, quit, crash or restart")
        self._machine().power.end(given["how"])
