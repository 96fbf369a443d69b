# SPDX-License-Identifier: GPL-2.0-or-later
"""Records that are collected in about the order of their clusters, and given back in exactly that order.

Several threads add them, so a few arrive late. They are sorted in memory, some hundred thousand at a time,
and then appended to an unnamed file; those below the last one of the file stay in memory::

    added ─► sorted here ─► |  file, ascending  |
                       └──► late ones: a few batches for each part of the file

A disk of 1 TiB has 16 million of them, 400 MB.
"""

import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from backupctl.digests.clusters import RECORD, Records
from backupctl.errors import WriteFailed

MOST_IN_MEMORY = 1 << 18
"""Records, 24 bytes each."""
_NONE: Records = np.empty(0, RECORD)


class RecordTable:
    """Collects records. directory: for the file, if one is needed; it is freed with the table."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._added: list[Records] = []
        self._added_count = 0
        self._late: list[Records] = []
        self._file = -1
        self._stored = 0
        self._last = -1
        self.count = 0

    def add(self, records: Records) -> None:
        """Add records, ascending, of clusters that have none yet. From any thread. Raises WriteFailed."""
        with self._lock:
            self._added.append(records)
            self._added_count += len(records)
            self.count += len(records)
            if self._added_count > MOST_IN_MEMORY:
                self._store()

    def parts(self) -> Iterator[Records]:
        """Yield all records, ascending; again each time. Raises OSError."""
        rest = _sorted([*self._added, *self._late])
        for first in range(0, self._stored, MOST_IN_MEMORY):
            part = self._read(first, min(MOST_IN_MEMORY, self._stored - first))
            between = int(np.searchsorted(rest["cluster"], part["cluster"][-1]))
            yield _sorted([part, rest[:between]])
            rest = rest[between:]
        if len(rest):
            yield rest

    def _store(self) -> None:
        records = _sorted(self._added)
        self._added, self._added_count = [], 0
        late = int(np.searchsorted(records["cluster"], self._last, side="right")) if self._stored else 0
        if late:
            self._late.append(records[:late].copy())
        records = records[late:]
        if not len(records):
            return
        try:
            self._write(records)
        except OSError as err:
            raise WriteFailed(f"cannot store the digests: {err.strerror}") from err
        self._last = int(records["cluster"][-1])

    def _write(self, records: Records) -> None:
        if self._file < 0:
            with tempfile.TemporaryFile(dir=self._directory) as made:
                self._file = os.dup(made.fileno())
            # Not earlier: a worker that hangs may still write, perhaps to another file of that number.
            weakref.finalize(self, os.close, self._file)
        content = memoryview(np.ascontiguousarray(records).view(np.uint8).data)
        while content:
            written = os.write(self._file, content)
            content = content[written:]
        self._stored += len(records)

    def _read(self, first: int, count: int) -> Records:
        length = count * RECORD.itemsize
        content = os.pread(self._file, length, first * RECORD.itemsize)
        if len(content) != length:
            raise OSError(0, "the file of the digests is truncated")
        return np.frombuffer(content, RECORD)


def _sorted(parts: list[Records]) -> Records:
    found = np.concatenate([_NONE, *parts])
    numbers = found["cluster"]
    if bool(np.all(numbers[1:] > numbers[:-1])):
        return found
    return found[np.argsort(numbers)]
