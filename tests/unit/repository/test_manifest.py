# SPDX-License-Identifier: GPL-2.0-or-later
import json
from dataclasses import replace

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from backupctl.errors import BackupctlError, DamageFound, UnknownFormat
from backupctl.names import DiskName, NodeName, PointId, RepositoryId, VmName
from backupctl.repository import strict_json
from backupctl.repository.history import Entry
from backupctl.repository.journal import Journal, JournalDisk
from backupctl.repository.manifest import DiskEntry, FreezeEntry, Manifest
from tests.unit.points import P1, P2, P3, disk_entry

GOOD = Manifest(
    point=P2,
    kind="incremental",
    parent=P1,
    vm=VmName("vm1"),
    repository=RepositoryId("0" * 32),
    disks=(disk_entry("vda", P1), replace(disk_entry("vdb"), reason="new disk: nö point", format="raw")),
    freeze=FreezeEntry("auto", "frozen", 51),
    consistency="filesystem",
    qemu="7.2.22 (Debian)",
    backupctl="0.1.0",
    start="2026-01-01T00:00:00Z",
    end="2026-01-01T00:00:01Z",
    checkpoints=2,
)
JOURNAL = Journal(
    point=P2,
    vm=VmName("vm1"),
    repository=RepositoryId("0" * 32),
    kind="incremental",
    step="attach",
    started="2026-01-01T00:00:00Z",
    pid=42,
    disks=(JournalDisk(DiskName("vda"), NodeName("node0"), 0, P1),),
    froze=True,
)


def signed(**changes: object) -> bytes:
    """A manifest that says whatever it is told to, with the right checksum."""
    document = {**GOOD.to_dict(), **changes}
    document["checksum"] = strict_json.checksum(document)
    return json.dumps(document).encode()


def disk(**changes: object) -> dict[str, object]:
    return {**GOOD.to_dict()["disks"][0], **changes}


def test_a_manifest_comes_back_as_it_was():
    assert Manifest.from_json(GOOD.to_json()) == GOOD


def test_what_is_written_stays_the_same_byte_for_byte():
    """Other programs read these files, and older versions of this one."""
    entry = Entry("committed", P1, "0" * 32, "2026-01-01T00:00:00Z", "")
    written = [GOOD.to_json(), JOURNAL.to_json(), entry.to_line()]
    assert [blake3(content).hexdigest(16) for content in written] == [
        "3df4e6e511087a534090311b8918ed38",
        "07a1971622a6d97ed3c62f5d08a40928",
        "a33c4e73954e82de397b0ca35e98565a",
    ]
    assert Entry.from_line(entry.to_line()) == entry


def test_any_flipped_bit_is_found_unless_it_changes_no_meaning():
    content = GOOD.to_json()
    harmless = 0
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            try:
                found = Manifest.from_json(bytes(damaged))
            except (DamageFound, UnknownFormat):
                continue
            assert found == GOOD
            harmless += 1
    assert harmless <= 1  # the hexadecimal digit of an escaped letter, in the other case


def test_a_manifest_cut_at_any_length_is_found():
    content = GOOD.to_json().rstrip()
    for length in range(len(content)):
        with pytest.raises(DamageFound):
            Manifest.from_json(content[:length])


def test_a_newer_format_is_told_from_damage():
    with pytest.raises(UnknownFormat, match="newer"):
        Manifest.from_json(signed(format=4))


def test_a_point_of_a_vm_that_is_off_has_a_format_that_older_programs_do_not_take_for_damaged():
    offline = replace(GOOD, consistency="offline")
    assert (GOOD.to_dict()["format"], offline.to_dict()["format"]) == (1, 2)
    assert Manifest.from_json(offline.to_json()) == offline
    with pytest.raises(DamageFound):
        Manifest.from_json(signed(consistency="offline"))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0},
        {"format": 2},
        {"format": True},
        {"format": "1"},
        {"extra": 1},
        {"point": "20260102T000000"},
        {"point": "../../etc"},
        {"vm": "../vm"},
        {"vm": "a/b"},
        {"parent": None},
        {"parent": P2},
        {"parent": P3},
        {"kind": "full"},
        {"kind": "differential"},
        {"disks": []},
        {"disks": [disk(), disk()]},
        {"disks": [disk(name="../vda")]},
        {"disks": [disk(size=-1)]},
        {"disks": [disk(size=1 << 61)]},
        {"disks": [disk(size=True)]},
        {"disks": [disk(size=1.5)]},
        {"disks": [disk(size="1")]},
        {"disks": [disk(parent=P2)]},
        {"disks": [disk(parent=None)]},
        {"disks": [disk(kind="full")]},
        {"disks": [disk(persistent=1)]},
        {"disks": [disk(new="field")]},
        {"disks": ["vda"]},
        {"disks": {}},
        {"freeze": {"asked": "auto", "got": "frozen", "milliseconds": -1}},
        {"freeze": None},
        {"consistency": "perfect"},
        {"start": "yesterday"},
        {"repository": "0" * 31},
        {"qemu": "x" * 101},
        {"qemu": "x\0"},
        {"repository": "0" * 32 + "\n"},
        {"vm": "vm1\n"},
        {"disks": [disk(digests="0" * 32 + "\n")]},
        {"disks": [disk(reason="\ud800")]},
        {"disks": [disk(size=1.0)]},
        {"disks": [{key: value for key, value in disk().items() if key != "merged"}]},
        {"disks": [disk(merged={"parent": P2, "file_bytes": 1, "stored_bytes": 1, "digests": "0" * 32})]},
        {"disks": [disk(merged={"parent": None, "file_bytes": 1, "stored_bytes": 1, "digests": ""})]},
        {"freeze": {"asked": "auto", "got": "none", "milliseconds": None, "more": 1}},
        {"freeze": {"asked": "sometimes", "got": "none", "milliseconds": None}},
    ],
)
def test_nonsense_is_refused_although_the_checksum_agrees(changes):
    with pytest.raises(DamageFound):
        Manifest.from_json(signed(**changes))


def test_a_missing_field_is_refused():
    document = GOOD.to_dict()
    for name in document:
        less = {key: value for key, value in document.items() if key != name}
        less["checksum"] = strict_json.checksum(less)
        with pytest.raises(DamageFound, match=name):
            Manifest.from_json(json.dumps(less).encode())


def test_a_name_that_stands_twice_is_refused():
    content = GOOD.to_json().replace(b'"qemu":', b'"vm": "vm1", "qemu":')
    with pytest.raises(DamageFound, match="twice"):
        Manifest.from_json(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b" " * (strict_json.MAX_BYTES + 1),
        b'{"checksum": "", "x": ' + b'{"x":' * 900 + b"1" + b"}" * 900 + b"}",
    ],
    ids=range(12),
)
def test_what_is_no_manifest_at_all_is_damage_and_nothing_worse(content):
    with pytest.raises(DamageFound):
        Manifest.from_json(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.sampled_from(sorted(GOOD.to_dict())), JSON)
def test_any_value_in_any_field_is_the_same_or_damage(name, value):
    try:
        found = Manifest.from_json(signed(**{name: value}))
    except BackupctlError:
        return
    assert found.to_dict() == {**GOOD.to_dict(), name: value}


@given(st.binary(max_size=200))
def test_any_bytes_are_no_journal_and_nothing_worse(content):
    with pytest.raises(strict_json.Malformed):
        Journal.from_json(content)


def test_a_journal_comes_back_as_it_was():
    assert Journal.from_json(JOURNAL.to_json()) == JOURNAL


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": True},
        {"point": "../20260102T000000Z"},
        {"vm": "/etc"},
        {"pid": -1},
        {"pid": 1 << 70},
        {"froze": 1},
        {"kind": "other"},
        {"step": "x" * 101},
        {"disks": [{"name": "../vda", "node": "n", "number": 0, "base": None}]},
        {"disks": [{"name": "vda", "node": "n", "number": 1 << 40, "base": None}]},
        {"disks": [{"name": "vda", "node": "n", "number": 0, "base": "../x"}]},
        {"disks": [{"name": "vda", "node": "n", "number": 0}]},
        {"disks": [{"name": "vda", "node": "n", "number": 0, "base": None, "more": 1}]},
        {"node": "\ud800"},
        {"more": 1},
    ],
)
def test_a_hostile_journal_is_refused(changes):
    document = json.loads(JOURNAL.to_json())
    with pytest.raises(strict_json.Malformed):
        Journal.from_json(json.dumps({**document, **changes}).encode())


def test_a_disk_is_found_by_name():
    assert GOOD.disk("vdb") == GOOD.disks[1]
    assert GOOD.disk("vdc") is None
    assert isinstance(GOOD.disks[0], DiskEntry)
    assert isinstance(GOOD.point, str)
    assert PointId(GOOD.point) == P2
