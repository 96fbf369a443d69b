# SPDX-License-Identifier: GPL-2.0-or-later
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from backupctl.digests import digest_map
from backupctl.digests.clusters import RECORD
from backupctl.digests.digest_map import DigestMap
from backupctl.names import DiskName
from backupctl.repository import audit, checked_chains
from backupctl.repository.checked_chains import CheckedChains
from tests.unit.points import P1, P2, Builder

VDA = DiskName("vda")
MIB = 1 << 20


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is opened from now on, by its last two names."""
    real, found = os.open, Counter[str]()

    def counting(path, *arguments, **options):
        found["/".join(Path(path).parts[-2:])] += 1
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counting)
    return found


def test_a_run_opens_each_file_of_its_chain_once(two_points, opened):
    """180 layers cost an incremental half of its time when each step followed the chain again."""
    builder, _ = two_points
    points = builder.directory.scan_all()
    audit.reconcile(builder.directory, points)
    assert not audit.problems(builder.directory, points.committed)
    chains = CheckedChains(builder.directory, points)
    assert chains.error(P2, VDA) is None
    assert chains.too_long(3, P2, VDA) is None
    assert chains.too_long(2, P2, VDA) == "its chain has 2 layers, as many as --max-chain allows"
    below = chains.content(P2, VDA, MIB)
    assert below.stores(0, 16)
    of_points = {name: times for name, times in opened.items() if name.startswith((P1, P2))}
    wanted = [
        f"{point}/{name}" for point in (P1, P2) for name in ("manifest.json", "vda.qcow2", "vda.digests")
    ]
    assert of_points == dict.fromkeys(wanted, 1)


@pytest.mark.parametrize("held", [0, 1])
def test_a_chain_whose_maps_are_not_kept_has_the_same_content(two_points, monkeypatch, held):
    builder, _ = two_points
    monkeypatch.setattr(digest_map, "_FEW_RECORDS", 0)
    monkeypatch.setattr(checked_chains, "_MOST_MAPPED", held)
    chains = CheckedChains(builder.directory)
    fresh = CheckedChains(builder.directory).content(P2, VDA, MIB)
    assert chains.error(P2, VDA) is None
    assert chains.content(P2, VDA, MIB).window(0, 16).tolist() == fresh.window(0, 16).tolist()


def test_a_point_that_is_missing_is_noticed_without_a_look_into_the_others(two_points, opened):
    builder: Builder = two_points[0]
    audit.reconcile(builder.directory)
    opened.clear()
    assert audit.missing(builder.directory) == ()
    assert not [name for name in opened if name.endswith("manifest.json")]
    (builder.directory.path / P1).rename(builder.directory.path / "elsewhere")
    assert audit.missing(builder.directory) == (P1,)


@pytest.mark.parametrize(("count", "mapped"), [(256, False), (257, True)])
def test_a_small_map_is_kept_without_its_file(tmp_path, count, mapped):
    records = np.zeros(count, RECORD)
    records["cluster"] = np.arange(count)
    path = tmp_path / "disk.digests"
    digest_map.write(path, count << 16, records)
    before = len(os.listdir("/proc/self/fd"))
    found = DigestMap.open(path)
    assert found.mapped is mapped
    assert found.records.tolist() == records.tolist()
    assert not found.records.flags.writeable
    assert len(os.listdir("/proc/self/fd")) - before == int(mapped)
