# SPDX-License-Identifier: GPL-2.0-or-later
import struct

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupctl.digests import digest_map
from backupctl.digests.clusters import CLUSTER_BYTES, RECORD
from backupctl.digests.digest_map import DigestMap
from backupctl.errors import DamageFound, WriteFailed

SIZE = 100 * CLUSTER_BYTES - 512


def some(*clusters: int):
    return np.array([(number, number + 1, 7) for number in clusters], RECORD)


def test_a_map_reads_as_it_was_written_and_is_bound_to_its_checksum(tmp_path):
    checksum = digest_map.write(tmp_path / "vda.digests", SIZE, some(0, 5, 99))
    found = DigestMap.open(tmp_path / "vda.digests")
    assert (found.size_bytes, found.checksum) == (SIZE, checksum)
    assert found.records.tolist() == some(0, 5, 99).tolist()
    assert not found.records.flags.writeable


def test_the_file_is_what_its_documentation_says(tmp_path):
    digest_map.write(tmp_path / "vda.digests", SIZE, some(3))
    content = (tmp_path / "vda.digests").read_bytes()
    head = struct.pack("<8sIIQQ", b"bkdigest", 1, 65536, SIZE, 1)
    record = struct.pack("<QQQ", 3, 4, 7)
    assert content == head + blake3(head + record).digest(16) + bytes(16) + record


def test_an_empty_map_is_a_map(tmp_path):
    digest_map.write(tmp_path / "vda.digests", SIZE, some())
    assert len(DigestMap.open(tmp_path / "vda.digests").records) == 0


def test_a_map_is_never_written_over_another(tmp_path):
    digest_map.write(tmp_path / "vda.digests", SIZE, some(1))
    with pytest.raises(WriteFailed):
        digest_map.write(tmp_path / "vda.digests", SIZE, some(2))


@pytest.mark.parametrize("clusters", [(5, 3), (3, 3), (100,)])
def test_records_out_of_order_or_beyond_the_disk_are_damage(tmp_path, clusters):
    digest_map.write(tmp_path / "vda.digests", SIZE, some(*clusters))
    with pytest.raises(DamageFound, match="out of order"):
        DigestMap.open(tmp_path / "vda.digests")


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_any_changed_byte_and_any_other_length_is_found(tmp_path, data):
    path = tmp_path / "vda.digests"
    path.unlink(missing_ok=True)
    digest_map.write(path, SIZE, some(0, 5, 99))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        length = data.draw(st.integers(0, len(content) + 30).filter(lambda found: found != len(content)))
        content = content.ljust(length, b"\0")[:length]
    path.write_bytes(content)
    with pytest.raises(DamageFound):
        DigestMap.open(path)


def test_a_missing_map_is_damage(tmp_path):
    with pytest.raises(DamageFound, match="cannot read"):
        DigestMap.open(tmp_path / "vda.digests")
