# SPDX-License-Identifier: GPL-2.0-or-later
from contextlib import closing

import numpy as np
import pytest

from backupctl.errors import Interrupted, ReadFailed
from backupctl.images import create, nbd_server
from backupctl.transfer import read_layer
from backupctl.transfer.batch import Part
from backupctl.transfer.reader import NbdReader
from backupctl.transfer.source import Source
from fixtures.pieces import of_piece
from tests.unit.transfer.conftest import qcow2_node, qemu_io, tool

MIB = 1 << 20
CLUSTER = 65536


@pytest.fixture
def layer(tmp_path):
    """A layer over a full parent: clusters 1, 2 and 40 of data, 5 zero, and the short tail."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "parent.qcow2", str(4 * MIB + 512))
    qemu_io(tmp_path / "parent.qcow2", "qcow2", "write -q -P 9 0 4M")
    path = tmp_path / "layer.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "parent.qcow2", "-F", "qcow2", path)
    writes = (
        "write -q -P 1 64k 128k",
        "write -q -z 320k 64k",
        "write -q -P 3 2560k 64k",
        "write -q -P 4 4M 512",
    )
    qemu_io(path, "qcow2", *writes)
    return path


def parts(*numbers):
    return [Part(np.array(numbers, np.uint64), zero=False)]


def connect(address, export=nbd_server.EXPORT):
    return closing(Source.connect([address] * 2, export))


def test_nothing_is_read_of_nothing(tmp_path):
    create.create_layer(tmp_path / "empty.qcow2", MIB, None)
    with nbd_server.serve((tmp_path / "empty.qcow2",)) as address, connect(address) as source:
        lost = read_layer.read(
            NbdReader(source), [], pytest.fail, check=lambda: None, progress=lambda _done: None
        )
    assert len(lost) == 0


def test_the_records_are_those_of_the_bytes(layer):
    seen, told = [], []
    with nbd_server.serve((layer,)) as address, connect(address) as source:
        wanted = parts(1, 2, 40, 64)
        lost = read_layer.read(
            NbdReader(source), wanted, seen.append, check=lambda: None, progress=told.append
        )
    found = np.sort(np.concatenate(seen), order="cluster")
    expected = np.concatenate(
        [
            of_piece(CLUSTER, memoryview(bytes([1]) * 2 * CLUSTER)),
            of_piece(40 * CLUSTER, memoryview(bytes([3]) * CLUSTER)),
            of_piece(64 * CLUSTER, memoryview(bytes([4]) * 512)),
        ]
    )
    assert found.tolist() == expected.tolist()
    assert len(lost) == 0
    assert told[-1] == 3 * CLUSTER + 512


def test_only_the_clusters_that_cannot_be_read_are_lost(serve, tmp_path):
    path = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, str(4 * MIB))
    qemu_io(path, "qcow2", "write -q -P 7 0 4M")
    node = qcow2_node(path)
    rules = [{"event": "none", "iotype": "read", "errno": 5, "once": False, "sector": 20 * 128 + 7}]
    export = serve({"driver": "blkdebug", "image": node, "inject-error": rules})
    seen = []
    with closing(Source.connect([export.address] * 2, export.name)) as source:
        wanted = parts(*range(64))
        lost = read_layer.read(
            NbdReader(source), wanted, seen.append, check=lambda: None, progress=lambda _done: None
        )
    assert lost.tolist() == [20]
    assert sorted(np.concatenate(seen)["cluster"].tolist()) == [n for n in range(64) if n != 20]


def test_a_server_that_is_lost_is_no_damage_of_a_cluster(serve, layer):
    export = serve(qcow2_node(layer))

    wanted = parts(*range(4))
    with closing(Source.connect([export.address], export.name)) as source:
        export.process.kill()
        export.process.wait(60)
        with pytest.raises(ReadFailed, match="lost"):
            read_layer.read(
                NbdReader(source), wanted, pytest.fail, check=lambda: None, progress=lambda _done: None
            )


def test_a_request_to_stop_ends_the_reading(layer):
    def check():
        raise Interrupted("stopped")

    with nbd_server.serve((layer.parent / "parent.qcow2",)) as address, connect(address) as source:
        wanted = parts(*range(64)) * 25  # longer than the first look at `check`
        with pytest.raises(Interrupted):
            read_layer.read(
                NbdReader(source), wanted, lambda _records: None, check=check, progress=lambda _done: None
            )
