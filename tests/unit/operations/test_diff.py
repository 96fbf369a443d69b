# SPDX-License-Identifier: GPL-2.0-or-later
"""What changed between two points: against the bytes of the disks themselves, and as the user sees it."""

import json
import os
import pty
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from backupctl.cancel import Cancellation
from backupctl.cli import block_map
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.errors import DamageFound, NoSuchPoint, UsageError
from backupctl.operations.diff import diff
from tests.unit.points import P1, P2, P3, Builder, disk_entry

SIZE = 40 * CLUSTER_BYTES + 512


def compare(builder: Builder, before: str, after: str, disk: str | None = None):
    directory = builder.directory
    return diff(directory, directory.point(before), directory.point(after), disk=disk, stop=Cancellation())


def ranges(report):
    return list(report.disks[0].ranges())


def bytes_of(builder: Builder, point: str) -> bytes:
    image = builder.directory.path / point / "vda.qcow2"
    raw = builder.repository.path.parent / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True, timeout=60)
    return raw.read_bytes()


def differing(old: bytes, new: bytes) -> list[tuple[int, int]]:
    """Compare bytes, cluster by cluster, as slowly and plainly as can be."""
    found: list[tuple[int, int]] = []
    for offset in range(0, len(old), CLUSTER_BYTES):
        piece = old[offset : offset + CLUSTER_BYTES]
        if piece != new[offset : offset + CLUSTER_BYTES]:
            if found and sum(found[-1]) == offset:
                found[-1] = (found[-1][0], found[-1][1] + len(piece))
            else:
                found.append((offset, len(piece)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_it_names_just_the_clusters_whose_bytes_differ_also_between_chains(builder: Builder, seed):
    """P1 and P2 are one chain, P3 a full of its own; every pair, both ways, against the real bytes."""
    chance = random.Random(seed)

    def writes():
        return [
            (chance.randrange(0, SIZE - 9000), bytes([chance.choice([0, 1, 2])]) * chance.randrange(1, 9000))
            for _ in range(8)
        ]

    tail = [(SIZE - 512, bytes([seed]) * 512)]
    builder.point(P1, (disk_entry(size=SIZE), writes()))
    builder.point(P2, (disk_entry(size=SIZE, parent=P1), [*writes(), *tail]))
    builder.point(P3, (disk_entry(size=SIZE), writes()))
    content = {point: bytes_of(builder, point) for point in (P1, P2, P3)}
    for before, old in content.items():
        for after, new in content.items():
            report = compare(builder, before, after)
            wanted = differing(old, new)
            assert ranges(report) == wanted
            assert report.disks[0].changed_bytes == sum(length for _, length in wanted)


def test_what_one_size_does_not_have_counts_as_changed(builder: Builder):
    builder.point(P1, (disk_entry(size=2 * CLUSTER_BYTES + 512), []))
    builder.point(P2, (disk_entry(size=5 * CLUSTER_BYTES, parent=P1), []))
    for pair in ((P1, P2), (P2, P1)):
        report = compare(builder, *pair)
        assert ranges(report) == [(2 * CLUSTER_BYTES, 3 * CLUSTER_BYTES)]
    assert (report.disks[0].size_before, report.disks[0].size_after) == (
        5 * CLUSTER_BYTES,
        2 * CLUSTER_BYTES + 512,
    )


def test_disks_that_only_one_point_holds_are_named(builder: Builder):
    builder.point(P1, (disk_entry("vda"), []), (disk_entry("vdb"), []))
    builder.point(P2, (disk_entry("vda"), []), (disk_entry("vdc"), []))
    report = compare(builder, P1, P2)
    assert (report.only_before, report.only_after) == (("vdb",), ("vdc",))
    assert [one.name for one in report.disks] == ["vda"]
    with pytest.raises(NoSuchPoint, match="vdb"):
        compare(builder, P1, P2, "vdb")
    builder.point(P3, (disk_entry("vdz"), []))
    with pytest.raises(UsageError, match="in common"):
        compare(builder, P1, P3)


def test_a_damaged_digest_map_is_no_basis(two_points):
    builder, _ = two_points
    path = builder.directory.path / P2 / "vda.digests"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamageFound, match="digest map"):
        compare(builder, P1, P2)


def run(builder: Builder, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "backupctl",
            "diff",
            "vm1",
            *arguments,
            "--repository",
            str(builder.repository.path),
        ],
        env={**os.environ, "COLUMNS": "60", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.fixture
def changed(builder: Builder) -> Builder:
    """One cluster of 32 changed, and a run of eight."""
    entry = disk_entry(size=32 * CLUSTER_BYTES)
    builder.point(P1, (entry, [(0, b"a" * CLUSTER_BYTES)]))
    later = replace(entry, kind="incremental", parent=P1)
    builder.point(P2, (later, [(CLUSTER_BYTES, b"b"), (8 * CLUSTER_BYTES, b"c" * 8 * CLUSTER_BYTES)]))
    return builder


def test_the_command_prints_a_document_for_programs(changed):
    document = json.loads(run(changed, P1, "latest", "--json").stdout)
    assert document["vm"] == "vm1"
    assert (document["before"], document["after"]) == (P1, P2)
    (disk,) = document["disks"]
    assert disk["changed_bytes"] == 9 * CLUSTER_BYTES
    assert disk["ranges"] == [
        {"offset": CLUSTER_BYTES, "length": CLUSTER_BYTES},
        {"offset": 8 * CLUSTER_BYTES, "length": 8 * CLUSTER_BYTES},
    ]


def test_the_command_draws_the_disk_plainly_where_there_is_no_terminal(changed):
    done = run(changed, P1, P2, PYTHONIOENCODING="utf-8")
    assert "vda: 576.0 KiB of 2.0 MiB changed (28.1 %) in 2 ranges" in done.stdout
    assert "       0 B  ·█······████████················\n" in done.stdout
    assert "\x1b" not in done.stdout
    done = run(changed, P1, P2, PYTHONIOENCODING="ascii")
    assert "       0 B  .#......########................\n" in done.stdout


def test_the_same_point_twice_has_nothing_changed(changed):
    done = run(changed, P2, P2)
    assert "vda: 0 B of 2.0 MiB changed (0.0 %) in 0 ranges" in done.stdout


def test_a_terminal_gets_colours(changed):
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "backupctl",
            "diff",
            "vm1",
            P1,
            P2,
            "--repository",
            str(changed.repository.path),
        ],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "PYTHONIOENCODING": "utf-8"},
        stdout=follower,
        stderr=subprocess.PIPE,
    )
    os.close(follower)
    said = b""
    try:
        while part := os.read(leader, 4096):
            said += part
    except OSError:  # a terminal whose other side was closed
        pass
    finally:
        os.close(leader)
    _, complaints = child.communicate(timeout=60)
    assert child.returncode == 0, complaints
    assert "\x1b[1;31m" in said.decode()
    assert "█" in said.decode()


def test_a_wrong_point_or_disk_is_a_usage_error(changed):
    assert run(changed, P1, P3).returncode == 2
    assert run(changed, P1, P2, "--disk", "vdx").returncode == 2


def test_one_changed_cluster_shows_on_a_disk_of_any_size():
    marked = np.zeros(16 << 20, np.bool_)  # 1 TiB
    marked[-1] = True
    drawn = block_map.draw(marked, 80, 16)
    assert drawn.clusters_each == 16384
    assert len(drawn.rows) <= 16
    assert drawn.rows[-1].shades[-1] == 1
    assert sum(shade for row in drawn.rows for shade in row.shades) == 1


def test_shades_tell_the_share_also_of_a_last_character_that_stands_for_less():
    marked = np.array([0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1], np.bool_)
    drawn = block_map.draw(marked, 6, 1)
    assert drawn.clusters_each == 4
    assert drawn.rows[0].shades == (0, 2, 3, 4, 4, 4)


def test_a_disk_of_no_size_has_no_rows():
    assert block_map.draw(np.zeros(0, np.bool_), 10, 4).rows == ()
