# SPDX-License-Identifier: GPL-2.0-or-later
"""Persistent bitmaps on disk, stored and loaded as QEMU does it in a qcow2 file.

They are written when QEMU exits cleanly. Those that are loaded again are marked "in use" in the file; if
QEMU then crashes, the mark stays, and the next QEMU finds them inconsistent. A bitmap that was created since
and never written is lost. One that is removed is deleted from the file at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backupctl.simulator.dirty import DirtyBitmap
from backupctl.simulator.nodes import Node

_HEADER = "header"


@dataclass(frozen=True)
class BitmapFile:
    """One disk's stored bitmaps."""

    path: Path

    def load(self, node: Node) -> None:
        """Load a node's stored bitmaps and mark them as in use."""
        entries, words = self._read()
        for number, entry in enumerate(entries):
            bitmap = DirtyBitmap(
                entry["name"], node.size, entry["granularity"], entry["recording"], persistent=True
            )
            bitmap.inconsistent = bool(entry["in-use"])
            if not bitmap.inconsistent and entry["size"] == node.size:
                bitmap.bits.load(words[f"b{number}"])
            node.bitmaps[bitmap.name] = bitmap
            entry["in-use"] = True
        if entries:
            self._write(entries, words)

    def save(self, node: Node) -> None:
        """Store a node's persistent bitmaps, as a clean exit of QEMU does.

        Those already in the file keep their order; the others follow, newest first.
        """
        entries: list[dict[str, Any]] = []
        words: dict[str, Any] = {}
        known = [entry["name"] for entry in self._read()[0]]
        newest_first = list(reversed(node.bitmaps.values()))
        for bitmap in sorted(newest_first, key=lambda each: _place(known, each.name)):
            if bitmap.persistent:
                words[f"b{len(entries)}"] = bitmap.bits.leaves
                entry = {"name": bitmap.name, "granularity": bitmap.granularity, "size": bitmap.size}
                entries.append(entry | {"recording": bitmap.recording, "in-use": bitmap.inconsistent})
        self._write(entries, words)

    def forget(self, name: str) -> None:
        """Remove a bitmap from the file."""
        entries, words = self._read()
        kept = [number for number, entry in enumerate(entries) if entry["name"] != name]
        if len(kept) < len(entries):
            self._write([entries[n] for n in kept], {f"b{i}": words[f"b{n}"] for i, n in enumerate(kept)})

    def _read(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if not self.path.exists():
            return [], {}
        with np.load(self.path) as content:
            found = {name: content[name] for name in content.files}
        return json.loads(bytes(found.pop(_HEADER))), found

    def _write(self, entries: list[dict[str, Any]], words: dict[str, Any]) -> None:
        header = np.frombuffer(json.dumps(entries).encode(), np.uint8)
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: header}, **words)
        partial.replace(self.path)


def _place(names: list[str], name: str) -> int:
    return names.index(name) if name in names else len(names)
