# SPDX-License-Identifier: GPL-2.0-or-later
"""Repositories to test with: a builder that makes points as a run does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import nbd
import numpy as np
import pytest

from backupctl.digests import digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, RECORD, Records
from backupctl.errors import WriteFailed
from backupctl.images import create, nbd_server
from backupctl.images.open_image import OpenImage
from backupctl.names import DiskName, NodeName, PointId, VmName, point_time
from backupctl.repository import chain
from backupctl.repository.journal import Journal
from backupctl.repository.manifest import DiskEntry, FreezeEntry, Manifest
from backupctl.repository.pending_point import PendingPoint
from backupctl.repository.point import Point
from backupctl.repository.repository import Repository
from backupctl.repository.stored_files import NewFile
from backupctl.repository.vm_directory import VmDirectory
from backupctl.transfer.nbd_client import Connection
from fixtures.pieces import of_piece

P1 = PointId("20260101T000000Z")
P2 = PointId("20260102T000000Z")
P3 = PointId("20260103T000000Z")
Writes = Iterable[tuple[int, bytes]]
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


def disk_entry(name: str = "vda", parent: PointId | None = None, size: int = 1 << 20) -> DiskEntry:
    return DiskEntry(
        name=DiskName(name),
        kind="incremental" if parent else "full",
        parent=parent,
        size=size,
        node=NodeName(name),
        format="qcow2",
        persistent=True,
        reason="",
        dirty_bytes=1,
        copied_bytes=1,
        zero_bytes=0,
        stored_bytes=1,
        file_bytes=1,
        unchanged_bytes=0,
        scanned=False,
        digests="0" * 32,
    )


@dataclass
class Builder:
    repository: Repository

    @property
    def directory(self) -> VmDirectory:
        return self.repository.vm(VmName("vm1"))

    def journal(self, point: PointId) -> Journal:
        return Journal(
            point=point,
            vm=self.directory.name,
            repository=self.repository.id,
            kind="full",
            step="attach",
            started="2026-01-01T00:00:00Z",
            pid=1,
            disks=(),
            froze=False,
        )

    def manifest(self, point: PointId, *disks: DiskEntry) -> Manifest:
        parent = max((disk.parent for disk in disks if disk.parent), default=None)
        return Manifest(
            point=point,
            kind="incremental" if parent else "full",
            parent=parent,
            vm=self.directory.name,
            repository=self.repository.id,
            disks=disks or (disk_entry(),),
            freeze=FreezeEntry("auto", "none", None),
            consistency="crash",
            qemu="7.2.22",
            backupctl="0.1.0",
            start=f"{point_time(point):%Y-%m-%dT%H:%M:%SZ}",
            end=f"{point_time(point):%Y-%m-%dT%H:%M:%SZ}",
            checkpoints=0,
        )

    def begin(self, point: PointId) -> PendingPoint:
        with self.directory.lock():
            return self.directory.begin(point, self.journal(point))

    def point(
        self, point: PointId, *disks: tuple[DiskEntry, Writes], definition: Iterable[NewFile] = ()
    ) -> Point:
        """Make a committed point with real images, each written with (offset, bytes)."""
        partial = self.begin(point)
        entries = []
        for entry, writes in disks:
            path = partial.path / f"{entry.name}.qcow2"
            below = chain.below(self.directory, entry.parent, entry.name)
            create.create_layer(
                path, entry.size, f"../{entry.parent}/{entry.name}.qcow2" if entry.parent else None
            )
            write_image((path, *(layer.path for layer in below)), writes)
            checksum = digest_map.write(digest_map.path_of(path), entry.size, stored(path, entry.size))
            entries.append(replace(entry, file_bytes=path.stat().st_size, digests=checksum))
        manifest = self.manifest(point, *entries)
        return partial.commit(replace(manifest, definition=partial.store(tuple(definition))))


def stored(image: Path, size: int) -> Records:
    """Return the records of the clusters that a layer itself holds, read with QEMU's own tools."""
    content = image.with_suffix(".raw")
    with OpenImage.open(image) as found:
        options, inherited = f"json:{json.dumps(create.blockdev([found]))}", [found.descriptor]
        command = ["qemu-img", "map", "-U", "--output=json", options]
        held = subprocess.run(command, check=True, capture_output=True, timeout=60, pass_fds=inherited)
        command = ["qemu-img", "convert", "-U", "-O", "raw", options, str(content)]
        subprocess.run(command, check=True, timeout=60, pass_fds=inherited)
    every = of_piece(0, memoryview(content.read_bytes()[:size]))
    content.unlink()
    runs = [run for run in json.loads(held.stdout) if run["present"]]
    return np.concatenate(
        [
            np.empty(0, RECORD),
            *(
                every[run["start"] // CLUSTER_BYTES : -(-(run["start"] + run["length"]) // CLUSTER_BYTES)]
                for run in runs
            ),
        ]
    )


def write_image(layers: tuple[Path, ...], writes: Writes) -> None:
    with nbd_server.serve(layers, writable=True) as address:
        connection = Connection(nbd_server.EXPORT, WriteFailed, 60)
        with closing(connection):
            connection.connect(address)
            for offset, content in writes:
                if any(content):
                    buffer = nbd.Buffer.from_buffer(bytearray(content))
                    connection.finish([connection.start_write(buffer, offset)])
                else:
                    connection.finish([connection.start_zero(len(content), offset)])


def in_memory(path: Path) -> bool:
    """Whether the first bytes of a file can be read without asking the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(512)], 0, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


def any_step(event: str, _arguments: object) -> bool:
    return event in WATCHED


def changing_step(event: str, arguments: tuple[object, ...]) -> bool:
    """All but looking at files."""
    return event in WATCHED and (event != "open" or bool(int(str(arguments[2])) & os.O_CREAT))


def die_at(
    number: int, work: Callable[[], object], counts: Callable[[str, tuple[object, ...]], bool] = any_step
) -> bool:
    """Do `work` in a child that dies before its nth step on the file system; whether it got to its end."""
    child = os.fork()
    if child == 0:
        left = number
        real_sync = os.fsync

        def step() -> None:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1

        def sync(descriptor):
            step()
            real_sync(descriptor)

        os.fsync = sync
        sys.addaudithook(lambda event, arguments: step() if counts(event, arguments) else None)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), f"step {number}: the work failed"
    return code == 0


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(Repository.create(tmp_path / "repository"))


@pytest.fixture
def two_points(builder: Builder) -> tuple[Builder, bytes]:
    """A full and an incremental of one disk of 300 KiB + 512 bytes, and what the disk holds at the end."""
    size = 300 * 1024 + 512
    entry = disk_entry(size=size)
    builder.point(P1, (entry, [(0, b"a" * 70_000), (size - 512, b"tail" * 128)]))
    changed = replace(entry, kind="incremental", parent=P1)
    builder.point(P2, (changed, [(65536, b"b" * 4096), (0, bytes(4096))]))
    content = bytearray(size)
    content[:70_000] = b"a" * 70_000
    content[-512:] = b"tail" * 128
    content[65536 : 65536 + 4096] = b"b" * 4096
    content[:4096] = bytes(4096)
    return builder, bytes(content)
