# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest: it writes to its disks, from a seed, except while it is frozen.

Every change is recorded in a journal, with its time and its result, so that a test knows what the disks
must contain.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backupctl.simulator.nodes import Extent, Node

BLOCK = 512
_COPY_BYTES = 1 << 20
JOURNAL_LENGTH = 100_000


@dataclass(frozen=True)
class Entry:
    """One change.

    at: seconds since the epoch. seed: of the bytes written. error: text of the errno, "" for none.
    """

    at: float
    disk: str
    what: str
    offset: int
    length: int
    seed: int | None
    error: str


class Guest:
    """A guest with disks.

    top: returns the node that a disk's device writes to. disks: those that the workload may use.
    freezes, thaws: when the agent did so, in seconds since the epoch.
    """

    def __init__(self, seed: int, top: Callable[[str], Node], disks: list[str]) -> None:
        self._random = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self._top = top
        self._disks = disks
        self._task: asyncio.Task[None] | None = None
        self.frozen = False
        self.running = True
        self.freezes: list[float] = []
        self.thaws: list[float] = []
        self.failed_writes = 0
        self.journal: list[Entry] = []

    def start(self, per_second: float, span_bytes: int | None = None) -> None:
        """Start writing. span: bytes from the start of each disk to write to; None for all."""
        self.stop()
        self._task = asyncio.get_running_loop().create_task(self._work(1 / per_second, span_bytes))
        self._task.add_done_callback(lambda task: task.cancelled() or task.result())

    def stop(self) -> None:
        """Stop writing."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    @property
    def working(self) -> bool:
        """Whether the workload was started."""
        return self._task is not None

    def change(self, disk: str, what: str, offset: int, length: int, data: bytes | None = None) -> str:
        """Write, zero or discard. Returns the error's text, "" on success."""
        return self._change(disk, what, offset, length, data or b"", None)

    async def _work(self, pause_seconds: float, span_bytes: int | None) -> None:
        while True:
            if self.running and not self.frozen:
                self.step(span_bytes)
            await asyncio.sleep(pause_seconds)

    def step(self, span_bytes: int | None = None) -> None:
        """Make one change of the seeded workload."""
        disk = self._random.choice(self._disks)
        size = min(self._top(disk).size, span_bytes or self._top(disk).size)
        what = self._random.choices(("write", "zero", "discard"), (8, 1, 1))[0]
        blocks = max(size // BLOCK, 1)
        first = self._random.randrange(blocks)
        length = min(self._random.randint(1, 256) * BLOCK, size - first * BLOCK)
        seed = self._random.getrandbits(32) if what == "write" else None
        self._change(disk, what, first * BLOCK, length, written(seed, length), seed)

    def _change(self, disk: str, what: str, offset: int, length: int, data: bytes, seed: int | None) -> str:
        node, error = self._top(disk), ""
        try:
            if what == "write":
                node.write(offset, data)
            elif what == "zero":
                node.zero(offset, length)
            else:
                node.discard(offset, length)
        except OSError as err:
            error = err.strerror or str(err)
            self.failed_writes += 1
        self.journal.append(Entry(time.time(), disk, what, offset, length, seed, error))
        del self.journal[:-JOURNAL_LENGTH]
        return error

    def tell_journal(self) -> list[dict[str, Any]]:
        """Return the journal, oldest first."""
        return [asdict(entry) for entry in self.journal]


def written(seed: int | None, length: int) -> bytes:
    """Return the bytes that the workload writes for a seed."""
    return b"" if seed is None else random.Random(seed).randbytes(length)  # noqa: S311 - reproducible


def copy_out(node: Node, path: Path) -> None:
    """Copy a node's content into a sparse raw file. Raises OSError."""
    with path.open("wb") as file:
        file.truncate(node.size)
        offset = 0
        for length, flags in node.extents(0, node.size):
            if flags == Extent.DATA:
                for start in range(offset, offset + length, _COPY_BYTES):
                    part = node.read(start, min(_COPY_BYTES, offset + length - start))
                    os.pwrite(file.fileno(), part, start)
            offset += length
