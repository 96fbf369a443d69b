# SPDX-License-Identifier: GPL-2.0-or-later
"""The targets: bytes go in; the parser gives a value, or one of the errors that it documents."""

import atexit
import json
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backupctl.cli import configuration, times, units
from backupctl.digests import digest_map
from backupctl.digests.clusters import RECORD
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import (
    AgentError,
    DamageFound,
    FilesystemError,
    InvalidName,
    MonitorError,
    NotARepository,
    Refused,
    RepositoryError,
    UnknownFormat,
    UsageError,
)
from backupctl.filesystems import lvm, partitions
from backupctl.filesystems.ext import ExtFileSystem
from backupctl.filesystems.fat import FatFileSystem
from backupctl.filesystems.xfs import XfsFileSystem
from backupctl.images import foreign_header, qcow2_check, qcow2_header
from backupctl.images.open_image import OpenImage
from backupctl.images.qcow2_tables import Tables
from backupctl.images.qcow2_writer import Qcow2Writer
from backupctl.names import DiskName, Namespace, NodeName, RepositoryId, disk_name, point_id, vm_name
from backupctl.operations.prune import retention
from backupctl.repository import activity, former_names, history, point_names, strict_json
from backupctl.repository.activity import Activity, DiskActivity
from backupctl.repository.history import PointEvent
from backupctl.repository.journal import Journal, JournalDisk
from backupctl.repository.manifest import FreezeEntry, Manifest
from backupctl.repository.repository import Repository
from backupctl.simulator import faults
from backupctl.simulator.disks import DiskSpec
from backupctl.sizes import CLUSTER_BYTES
from backupctl.system import listen
from backupctl.system.address import Address
from backupctl.system.direct_io import aligned
from backupctl.transfer import extents
from backupctl.transfer.extents import BadReply
from backupctl.vm import bitmap, disk
from backupctl.vm.guest import guard_monitor
from backupctl.vm.guest.agent import Agent
from backupctl.vm.qmp import bitmaps, monitor, reply, teardown
from backupctl.vm.qmp import inventory as disks
from tests.unit.filesystems.sources import Memory
from tests.unit.filesystems.test_lvm import IDS, TEXT, THIN, physical_volume
from tests.unit.filesystems.test_partitions import gpt, mbr
from tests.unit.points import P1, P2, disk_entry

DIRECTORY = Path(tempfile.mkdtemp(prefix="backupctl-fuzz-"))
atexit.register(shutil.rmtree, DIRECTORY, ignore_errors=True)
OWNER = Namespace.of(RepositoryId("0" * 32))
VM = vm_name("vm1")


@dataclass(frozen=True)
class Target:
    """parse: what is fed. allowed: what it may raise. seeds: inputs to begin with."""

    parse: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


MANIFEST = Manifest(
    point=P2,
    kind="incremental",
    parent=P1,
    vm=VM,
    repository=RepositoryId("0" * 32),
    disks=(disk_entry("vda", P1), disk_entry("vdb")),
    freeze=FreezeEntry("auto", "frozen", 51),
    consistency="filesystem",
    qemu="7.2.22",
    backupctl="0.1.0",
    start="2026-01-01T00:00:00Z",
    end="2026-01-01T00:00:01Z",
    checkpoints=0,
)
JOURNAL = Journal(
    point=P2,
    vm=VM,
    repository=RepositoryId("0" * 32),
    kind="incremental",
    step="attach",
    started="2026-01-01T00:00:00Z",
    pid=42,
    disks=(JournalDisk(disk_name("vda"), NodeName("node0"), 0, P1),),
    froze=True,
)
BITMAP = {"name": "backupctl-00000000-20260101T000000Z", "granularity": 65536, "count": 4096}
BITMAP |= {"recording": True, "busy": False, "persistent": True}
IMAGE = {"virtual-size": 1 << 20, "format": "qcow2", "filename": "/d.qcow2"}
IMAGE |= {"format-specific": {"type": "qcow2", "data": {"compat": "1.1"}}}
NODES = [{"node-name": "n0", "drv": "qcow2", "ro": False, "image": IMAGE, "dirty-bitmaps": [BITMAP]}]
INSERTED = {"node-name": "n0", "drv": "qcow2", "ro": False}
DEVICES = [{"device": "", "qdev": "vda", "removable": False, "inserted": INSERTED}]
GRAPH = {
    "nodes": [
        {"id": 1, "type": "block-driver", "name": "cbw0"},
        {"id": 2, "type": "block-driver", "name": "n0"},
    ],
    "edges": [{"parent": 1, "child": 2, "name": "file", "perm": [], "shared-perm": []}],
}
LISTED = [{"name": "type", "type": "string"}, {"name": "vda", "type": "child<virtio-blk-pci>"}]
MACHINE = {"query-named-block-nodes": NODES, "query-block": DEVICES, "qom-list": LISTED}
MACHINE |= {"query-block-jobs": [{"device": "job"}], "x-debug-query-block-graph": GRAPH, "qom-get": False}
EXPORTS = [{"id": "e", "node-name": "n0", "type": "vhost-user-blk"}]


class Told:
    """A monitor that answers what it was given."""

    commands: frozenset[str] = frozenset()

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def execute(self, command: str, _arguments: object = None) -> Any:
        return self._answers.get(command)


def inventory(content: bytes) -> disk.Inventory:
    told = Told(as_object(content))
    told.commands = frozenset({"x-debug-query-block-graph"})
    return disks.inventory(told)  # type: ignore[arg-type]


def bitmap(content: bytes) -> bitmap.Bitmap | None:
    with reply.understood("bitmap"):
        return bitmaps.parse(NodeName("n0"), as_object(content))


def beneath(content: bytes) -> NodeName | None:
    told = Told({"x-debug-query-block-graph": as_object(content)})
    told.commands = frozenset({"x-debug-query-block-graph"})
    return teardown._child_of(told, "cbw0")  # type: ignore[arg-type]


def event(content: bytes) -> None:
    """What QEMU says on its own; little of it is kept."""
    client, told = monitor._Client(), as_object(content)
    for _ in range(3):
        client._note(told.get("event"), told.get("data"))
    assert len(client.thresholds | client.ended) <= 1


def guard(content: bytes) -> dict[str, Any]:
    """A monitor's answer, as the guard reads it."""
    ours, its = socket.socketpair()
    with its, ours:
        its.sendall(content[:60_000])
        its.shutdown(socket.SHUT_WR)
        lines = guard_monitor.Lines(ours)
        return guard_monitor._answer(lines, time.monotonic() + 5, "return", "error")


def agent(content: bytes) -> int:
    """What an agent says to `guest-fsfreeze-freeze`, before it hangs up."""
    ours, its = socket.socketpair()
    with its, ours:
        its.sendall(content[:60_000])
        its.shutdown(socket.SHUT_WR)
        talk = Agent(ours, 0.5)
        talk._in_step = not content.startswith(b"\xff")
        return talk.freeze(0.5)


def status(content: bytes) -> list[extents.Extents]:
    """Block status of a disk of 64 MiB in two contexts, told by any numbers."""
    numbers = iter([*struct.unpack(f">{len(content) // 4}I", content[: len(content) // 4 * 4])] * 2)

    def ask(_offset: int, _length: int) -> dict[str, list[int]]:
        return {name: [one for _, one in zip(range(4), numbers, strict=False)] for name in ("a", "b")}

    found = list(extents.query_extents(ask, 64 << 20, ("a", "b")))
    offsets = np.concatenate([one.offsets for one in found])
    lengths = np.concatenate([one.lengths for one in found])
    assert lengths.sum() == 64 << 20
    assert (lengths > 0).all()
    assert (offsets == np.cumsum(lengths) - lengths).all()
    return found


def as_object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def in_file(name: str, parse: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Parse from a file of that name."""

    def from_file(content: bytes) -> object:
        (DIRECTORY / name).write_bytes(content)
        return parse(DIRECTORY / name)

    return from_file


def in_clusters(parse: Callable[[OpenImage], object]) -> Callable[[bytes], object]:
    """Parse an image, of which 512 bytes of each cluster are given."""

    def from_pieces(content: bytes) -> object:
        path = DIRECTORY / "tables.qcow2"
        with path.open("wb") as file:
            for number, at in enumerate(range(0, len(content), 512)):
                file.seek(number * CLUSTER_BYTES)
                file.write(content[at : at + 512])
        with OpenImage.open(path) as image:
            return parse(image)

    return from_pieces


def tables(image: OpenImage) -> None:
    """What the tables lead to lies in the file, and a damaged image is not called sound."""
    found = Tables(image)
    if found.clusters > 1 << 20:  # a large disk takes its time
        return
    lost = False
    for window in found.windows():
        assert int(window.offset.max(initial=0)) < found.header.file_bytes
        lost = lost or bool(window.lost.any())
    sound = qcow2_check.check_tables(image)
    assert sound.errors or not lost


def in_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda content: parse(content.decode("utf-8", "surrogateescape"))


def _activity() -> bytes:
    disks = (DiskActivity(DiskName("vda"), 1, 2, estimated=False),)
    now = "2026-01-01T00:00:00Z"
    path = DIRECTORY / "seed.lock"
    with path.open("wb") as file:
        activity.write(
            file.fileno(), Activity("full", 4711, "copy", P1, now, now, disks, 1, 2, left_seconds=3)
        )
    return path.read_bytes()


def _former_names() -> bytes:
    former_names.add(DIRECTORY, VM, P1)
    return (DIRECTORY / former_names.FILE_NAME).read_bytes()


def _digest_map() -> bytes:
    records = np.zeros(3, RECORD)
    records["cluster"] = [0, 2, 15]
    path = DIRECTORY / "seed.digests"
    path.unlink(missing_ok=True)
    digest_map.write(path, 1 << 20, records)
    return path.read_bytes()


def _image_header() -> bytes:
    fixed = struct.pack(">IIQIIQI", 0x514649FB, 3, 0, 0, 16, 1 << 20, 0)
    tables = struct.pack(">IQQIIQ", 1, 196608, 65536, 1, 0, 0)
    return (fixed + tables + struct.pack(">QQQII", 0, 0, 0, 4, 104) + bytes(8)).ljust(65536, b"\0")


def _image() -> bytes:
    """512 bytes of each cluster of an image of our writer."""
    path = DIRECTORY / "seed.qcow2"
    path.unlink(missing_ok=True)
    with OpenImage.create(path) as image, Qcow2Writer(image, 1 << 30, None) as writer:
        writer.write(np.array([0, 5, 9000], np.uint64), [aligned(3 * CLUSTER_BYTES)])
        writer.zero(np.array([1, 9001], np.uint64))
        writer.finish()
    content = path.read_bytes()
    return b"".join(content[at : at + 512] for at in range(0, len(content), CLUSTER_BYTES))


def names(text: str) -> None:
    """A checked name is the one given, and stays in its directory."""
    for check in (vm_name, disk_name, point_id):
        try:
            assert check(text) == text
        except InvalidName:
            continue
        assert "/" not in text
        assert text not in ("", ".", "..")
    OWNER.point_of(text)


def of_device(parse: Callable[[Memory], object]) -> Callable[[bytes], object]:
    """Put the bytes at the start of a small device."""
    return lambda content: parse(Memory(content.ljust(4 << 20, b"\0")))


def in_volume_group(content: bytes) -> list[lvm.Volume]:
    text = content[: 1 << 18].decode("latin-1")
    return lvm.volumes([Memory(bytes(physical_volume(text, 1 << 20, IDS[0])))])


def _partition_tables() -> Iterator[bytes]:
    yield mbr((0x83, 8, 8), (0x05, 100, 300)) + bytes(99 * 512) + mbr((0x83, 1, 50))
    yield bytes(gpt((40, 49))[:2048])


def _ext_superblock() -> bytes:
    found = bytearray(2048)
    struct.pack_into("<II", found, 1024, 256, 1024)
    struct.pack_into("<IIIIII", found, 1024 + 20, 1, 0, 0, 8192, 8192, 256)
    struct.pack_into("<HH", found, 1024 + 56, 0xEF53, 1)
    struct.pack_into("<I", found, 1024 + 76, 1)
    struct.pack_into("<HHIII", found, 1024 + 88, 256, 0, 4, 0x46, 1)
    struct.pack_into("<I", found, 1024 + 224, 8)
    return bytes(found)


def _xfs_superblock() -> bytes:
    found = bytearray(512)
    struct.pack_into(">4sIQ", found, 0, b"XFSB", 4096, 1024)
    struct.pack_into(">Q", found, 56, 128)
    struct.pack_into(">II", found, 84, 1024, 1)
    struct.pack_into(">HHH", found, 100, 5, 512, 512)
    struct.pack_into(">BBBBB", found, 120, 12, 9, 9, 3, 10)
    return bytes(found)


def _fat_boot_sector() -> bytes:
    found = bytearray(512)
    struct.pack_into("<HBHBHHBHxxxxxxxxII", found, 11, 512, 4, 1, 2, 512, 8000, 0xF8, 8, 0, 0)
    found[54:62] = b"FAT12   "
    return bytes(found)


TARGETS = {
    "strict": Target(strict_json.parse, (strict_json.Malformed,), (b'{"a": [1, "x"]}',)),
    "manifest": Target(Manifest.from_json, (DamageFound, UnknownFormat), (MANIFEST.to_json(),)),
    "history": Target(
        history.parse, (), (history._lines("", [PointEvent("begun"), PointEvent("found", P1, "0" * 32)]),)
    ),
    "journal": Target(Journal.from_json, (strict_json.Malformed,), (JOURNAL.to_json(),)),
    "activity": Target(in_file("lock", lambda path: activity._read(path.parent)), (), (_activity(),)),
    "former-names": Target(
        in_file("former-names", lambda path: former_names.read(path.parent)),
        (DamageFound,),
        (_former_names(),),
    ),
    "point-name": Target(
        in_text(point_names.check), (InvalidName,), (b"latest~1", b"20260101T00", b"at:20260101T000000Z")
    ),
    "time": Target(
        in_text(times.parse), (UsageError,), (b"2026-11-26 18:00:30 UTC", b"2026-11-26T18:00+01:00")
    ),
    "repository": Target(
        in_file("repository.json", lambda path: Repository.open(path.parent)),
        (DamageFound, UnknownFormat, NotARepository, RepositoryError),
        (b'{"format": 1, "id": "00000000000000000000000000000000"}\n',),
    ),
    "foreign-header": Target(foreign_header.parse, (ValueError,), (_image_header(),)),
    "header": Target(in_file("vda.qcow2", qcow2_header.read), (DamageFound,), (_image_header(),)),
    "tables": Target(in_clusters(tables), (DamageFound,), (_image(),)),
    "digests": Target(in_file("vda.digests", DigestMap.open), (DamageFound,), (_digest_map(),)),
    "address": Target(
        in_text(Address.parse),
        (UsageError,),
        (b"unix:/run/x", b"tcp:[::1]:4444", b"ssh://a@b:22/c", b"/run/x"),
    ),
    "config": Target(
        in_file("backupctl.toml", lambda path: configuration.load(str(path))),
        (UsageError,),
        (b'[defaults]\nfreeze_budget = 5\n[vm.web]\nqmp = "unix:/q"\n[vm.web.disks]\na = "b"\n',),
    ),
    "duration": Target(in_text(retention.duration), (UsageError,), (b"1y6m", b"36h")),
    "tcp": Target(in_text(listen.tcp_address), (UsageError,), (b"127.0.0.1:10809", b"[::1]:0", b"10809")),
    "disk": Target(
        in_text(DiskSpec.parse), (faults.BadFault,), (b"vda=10G,format=raw,node=n,iothread=on,readonly=on",)
    ),
    "size": Target(in_text(units.parse_size), (UsageError,), (b"100M", b"1.5 GiB/s")),
    "names": Target(
        in_text(names), (), (b"web", b"20260101T000000Z", b"backupctl-00000000-20260101T000000Z")
    ),
    "disks": Target(
        inventory,
        (MonitorError, Refused),
        (
            json.dumps(MACHINE).encode(),
            json.dumps(MACHINE | {"query-block": [], "query-block-exports": EXPORTS}).encode(),
        ),
    ),
    "bitmap": Target(bitmap, (MonitorError,), (json.dumps(BITMAP).encode(),)),
    "graph": Target(beneath, (MonitorError,), (json.dumps(GRAPH).encode(),)),
    "event": Target(event, (), (b'{"event": "BLOCK_WRITE_THRESHOLD", "data": {"node-name": "n0"}}',)),
    "guard": Target(
        guard,
        (EOFError, ValueError, RecursionError),  # as `take_down` expects
        (b'{"event": "X", "timestamp": {}}\n{"return": [{"id": "e"}]}\n',),
    ),
    "agent": Target(
        agent, (AgentError,), (b'{"return": 1}\n', b'\xff{"return": 7}\n{"error": {"desc": "x"}}\n')
    ),
    "extents": Target(status, (BadReply,), (struct.pack(">4I", 32 << 20, 0, 32 << 20, 1),)),
    "partitions": Target(of_device(partitions.read), (FilesystemError,), tuple(_partition_tables())),
    "ext": Target(of_device(ExtFileSystem), (FilesystemError,), (_ext_superblock(),)),
    "xfs": Target(of_device(XfsFileSystem), (FilesystemError,), (_xfs_superblock(),)),
    "fat": Target(of_device(FatFileSystem), (FilesystemError,), (_fat_boot_sector(),)),
    "lvm": Target(in_volume_group, (FilesystemError,), (TEXT.format(ids=IDS, seqno=3, more=THIN).encode(),)),
    "fault": Target(
        in_text(faults.parse),
        (faults.BadFault,),
        (
            b"qmp:transaction@2=late:5",
            b"nbd:read@1G-2G=error:EIO",
            b"scratch:tmp*=full:1M",
            b"nbd:sent@1k=drop",
        ),
    ),
}
