# SPDX-License-Identifier: GPL-2.0-or-later
"""Sources to read from: real images behind a real qemu-storage-daemon, unwell ones too."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Export:
    """A running export. process: the server, to be stopped or killed by the test that likes to."""

    address: Path
    name: str
    process: "subprocess.Popen[bytes]"

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)


def tool(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=60)


def qemu_io(image: Path, image_format: str, *commands: str) -> None:
    steps = [word for command in commands for word in ("-c", command)]
    tool("qemu-io", "-f", image_format, *steps, image)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Export]]:
    """Serves a block node over NBD: `serve({"driver": "raw", ...}, bitmaps=[...], writable=False)`."""
    started: list[Export] = []

    def start(
        node: dict[str, Any], bitmaps: Sequence[str] = (), *, writable: bool = False, name: str = "disk"
    ) -> Export:
        number = len(started)
        address, ready = tmp_path / f"nbd{number}.sock", tmp_path / f"ready{number}"
        export: dict[str, Any] = {"type": "nbd", "id": "e", "name": name, "node-name": "n"}
        export |= {"writable": writable, "bitmaps": list(bitmaps)}
        process = subprocess.Popen(
            [
                *("qemu-storage-daemon", "--blockdev", json.dumps({**node, "node-name": "n"})),
                *("--nbd-server", json.dumps({"addr": {"type": "unix", "path": str(address)}})),
                *("--export", json.dumps(export), "--pidfile", ready),
            ],
            start_new_session=True,
        )
        started.append(Export(address, name, process))
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return started[-1]

    yield start
    for export in started:
        export.process.kill()
        export.process.send_signal(signal.SIGCONT)
        export.process.wait(60)


def raw_node(path: Path) -> dict[str, Any]:
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


def qcow2_node(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


def noise(length: int) -> bytes:
    """Bytes of which none is zero."""
    return os.urandom(length).replace(b"\0", b"\1")
