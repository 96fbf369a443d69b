# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/repository.md is the format: its commands and its reader are run as they stand there.

The reader part knows nothing of backupctl: plain tools, and the program out of the page.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from blake3 import blake3

from backupctl.cancel import Cancellation
from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.digests.digest_map import DigestMap
from backupctl.operations.prune import run as prune
from backupctl.operations.prune.retention import Rules
from backupctl.progress import Silent
from backupctl.repository import markers
from backupctl.repository.history import Entry, EventKind
from backupctl.repository.journal import Journal, JournalDisk
from backupctl.repository.manifest import DiskEntry, FreezeEntry, Manifest
from backupctl.repository.repository import Repository
from tests.conftest import ROOT
from tests.unit.points import P1, P2, P3, Builder, die_at, disk_entry

PAGE = (ROOT / "docs/repository.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(READER,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MIB = 1 << 20


@pytest.fixture
def chain(builder: Builder) -> tuple[Builder, dict[str, bytes]]:
    """Three points of a disk that grew, shrank, lost data and has a short last cluster; and what it held."""
    chance = random.Random(1)
    held: dict[str, bytes] = {}
    sizes = {P1: 20 * CLUSTER_BYTES + 512, P2: 12 * CLUSTER_BYTES, P3: 30 * CLUSTER_BYTES + 1024}
    content = b""
    for point, parent in ((P1, None), (P2, P1), (P3, P2)):
        size = sizes[point]
        disk = bytearray(content[:size].ljust(size, b"\0"))
        writes = []
        for _ in range(5):
            first = chance.randrange(size // CLUSTER_BYTES - 1) * CLUSTER_BYTES
            data = chance.choice([bytes(CLUSTER_BYTES), chance.randbytes(CLUSTER_BYTES)])
            writes.append((first, data))
            disk[first : first + CLUSTER_BYTES] = data
        if size % CLUSTER_BYTES:
            writes.append((size - 512, b"t" * 512))
            disk[size - 512 :] = b"t" * 512
        builder.point(point, (disk_entry(parent=parent, size=size), writes), (disk_entry("vdb"), []))
        held[point] = content = bytes(disk)
    return builder, held


def environment(builder: Builder, point: str) -> dict[str, str]:
    """Return nothing but what the page's commands need; of backupctl's own code there is no trace."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    values = {"REPOSITORY": str(builder.repository.path), "VM": "vm1", "POINT": point, "DISK": "vda"}
    return {"PATH": path, "HOME": "/nonexistent", **values}


def follow(builder: Builder, point: str, directory: Path) -> str:
    """Run the page's commands, one after the other, as a stranger would; returns what they print."""
    directory.mkdir()
    (directory / "reader.py").write_text(READER)
    values = environment(builder, point)
    said = [shlex.quote(f"{name}={values[name]}") for name in ("REPOSITORY", "VM", "POINT", "DISK")]
    assert COMMANDS[0].startswith("export REPOSITORY=")
    script = "\n".join([f"export {' '.join(said)}", *COMMANDS[1:]])
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=directory,
        env=values,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(builder: Builder, point: str, raw: Path) -> "subprocess.CompletedProcess[str]":
    arguments = [str(builder.repository.path), "vm1", point, "vda", str(raw)]
    return subprocess.run(
        [sys.executable, "-I", "-c", READER, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_reader_shares_nothing_with_backupctl():
    imported = re.findall(r"^(?:import|from) (.+)$", READER, re.MULTILINE)
    assert imported == ["json, struct, sys", "pathlib import Path", "blake3 import blake3"]
    assert "backupctl" not in READER


@pytest.mark.parametrize("point", [P1, P2, P3])
def test_a_stranger_gets_every_point_back_and_can_prove_it(chain, tmp_path, point):
    builder, held = chain
    said = follow(builder, point, tmp_path / "stranger")
    assert (tmp_path / "stranger" / "disk.raw").read_bytes() == held[point]
    assert said.rstrip().endswith("0 wrong")
    assert f"\n{P1}\n{P2}\n{P3}\n" in said, "the points are listed, newest last"
    same = ["qemu-img", "compare", "boot.qcow2", "disk.raw"]
    directory = tmp_path / "stranger"
    assert subprocess.run(same, cwd=directory, capture_output=True, timeout=60, check=False).returncode == 0


def test_what_is_retired_is_no_point_but_is_read_all_the_same(chain, tmp_path):
    builder, held = chain
    markers.put(builder.directory.path / P2, markers.RETIRED)
    said = follow(builder, P3, tmp_path / "stranger")
    assert f"\n{P1}\n{P3}\n" in said
    assert (tmp_path / "stranger" / "disk.raw").read_bytes() == held[P3]


@pytest.mark.timeout(600)
def test_in_the_middle_of_a_prune_the_page_holds_as_well(chain, tmp_path):
    """Death after every tenth step of dropping two points: the stranger reads the third all the same."""
    builder, held = chain
    number, whole, states = 0, False, set()
    while not whole:
        copy = tmp_path / f"copy{number}"
        shutil.copytree(builder.repository.path, copy)
        other = Builder(Repository.open(copy))
        whole = die_at(
            number, lambda other=other: prune.prune(other.directory, Rules(last=1), Silent(), Cancellation())
        )
        _convert(other.directory.path / P3 / "vda.qcow2", tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == held[P3]
        assert read(other, P3, tmp_path / "raw").returncode == 0
        states |= {path.name for path in other.directory.path.glob("*/*")}
        states |= {"described"} if '"digests"' in _merged(other) else set()
        number += 10
    assert {"retired", "vda.merging", "vda.digests.merged", "described"} <= states, "all of it was met"


def _convert(image: Path, raw: Path) -> None:
    """The dead prune's QEMU ends with it, but perhaps a moment later: until then it holds its lock."""
    command = ["qemu-img", "convert", "-O", "raw", str(image), str(raw)]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return
        assert "Is another process using the image" in done.stderr
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _merged(builder: Builder) -> str:
    """Return what the newest manifest says between its two descriptions of a disk."""
    text = (builder.directory.path / P3 / "manifest.json").read_text()
    return "".join(re.findall(r'"merged": (\{[^}]*\})', text))


@pytest.mark.parametrize("name", ["manifest.json", "vda.digests", "vda.qcow2"])
def test_the_reader_finds_any_changed_byte_of_what_describes_a_layer(chain, tmp_path, name):
    """A dozen bytes of each, each on its own: a reader that only seems to check does not pass this."""
    builder, held = chain
    (tmp_path / "raw").write_bytes(held[P2])
    path = builder.directory.path / P2 / name
    content = path.read_bytes()
    places = {"vda.qcow2": [0, 4, 8, 16, 20, 24, 31]}.get(name, range(0, len(content), len(content) // 12))
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert read(builder, P2, tmp_path / "raw").returncode != 0, f"byte {at} of {name}"
    path.write_bytes(content)
    assert read(builder, P2, tmp_path / "raw").returncode == 0


def test_the_reader_finds_a_changed_byte_of_the_data(chain, tmp_path):
    builder, held = chain
    for at in (0, 5 * CLUSTER_BYTES, len(held[P3]) - 1):
        changed = bytearray(held[P3])
        changed[at] ^= 1
        (tmp_path / "raw").write_bytes(changed)
        done = read(builder, P3, tmp_path / "raw")
        assert (done.returncode, "1 wrong" in done.stdout) == (1, True)


def rows(heading: str) -> set[str]:
    """Return the names in the first column of the tables of a section."""
    section = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_tables_name_every_field_of_a_manifest_and_no_other():
    own = {one.name for one in fields(Manifest)} | {one.name for one in fields(DiskEntry)}
    assert rows("`manifest.json`") == own | {"format", "checksum"}
    for one in fields(FreezeEntry):
        assert f"`{one.name}`" in PAGE


def test_the_page_names_every_field_of_the_journal():
    section = PAGE.split("\n## `run.json`")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z]+)`", section))
    assert {one.name for one in (*fields(Journal), *fields(JournalDisk))} | {"format"} == named


def test_the_page_names_every_field_and_event_of_the_history():
    own = {one.name for one in fields(Entry)} | {"format", "checksum"}
    assert rows("`history`") == own | set(get_args(EventKind))


def test_a_stranger_can_check_the_history(builder: Builder):
    """By the words of the page alone: each line's checksum, and that it follows from the one before."""
    builder.point(P1, (disk_entry(size=MIB), [(0, b"x" * MIB)]))
    before = ""
    for line in (builder.directory.path / "history").read_text().splitlines():
        found = json.loads(line)
        said = found.pop("checksum")
        text = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        assert (blake3(text.encode()).hexdigest(16), found["before"]) == (said, before)
        before = said
    manifest = json.loads((builder.directory.path / P1 / "manifest.json").read_text())
    assert (found["event"], found["point"], found["manifest"]) == ("committed", P1, manifest["checksum"])


def test_the_page_names_every_marker():
    assert {markers.PROTECTED, markers.RETIRED, markers.merging("<disk>")} == rows("Markers")


def test_a_full_tebibyte_takes_what_the_page_says(builder: Builder):
    builder.point(P1, (disk_entry(size=MIB), [(0, b"x" * MIB)]))
    path = builder.directory.path / P1 / "vda.digests"
    each = (path.stat().st_size - 64) / len(DigestMap.open(path).records)
    assert f"{each * (1 << 40) / CLUSTER_BYTES / MIB:.0f} MiB" in PAGE
