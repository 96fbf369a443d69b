# SPDX-License-Identifier: GPL-2.0-or-later
"""Each parser of what comes from outside raises what it documents and nothing else, whatever comes."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupctl.errors import BackupctlError
from backupctl.names import DiskName, NodeName, PointId, RepositoryId, point_time
from backupctl.repository.journal import Journal, JournalDisk
from backupctl.simulator import faults
from backupctl.system.address import Address
from tests.fuzz.loop import mutate
from tests.fuzz.targets import BITMAP, JOURNAL, MACHINE, TARGETS, bitmap, inventory

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}", fullmatch=True).filter(
    lambda name: not name.endswith(".partial")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150)


def feed(name: str, content: bytes) -> None:
    target = TARGETS[name]
    try:
        target.parse(content)
    except target.allowed:
        return


@pytest.mark.parametrize("name", TARGETS)
def test_the_first_seed_is_good(name):
    """Else mutations would be of nothing."""
    TARGETS[name].parse(TARGETS[name].seeds[0])


@pytest.mark.parametrize("name", TARGETS)
@COMMON
@given(content=st.binary(max_size=400))
def test_any_bytes(name, content):
    feed(name, content)


@pytest.mark.parametrize("name", TARGETS)
@COMMON
@given(text=st.text(max_size=200))
def test_any_text(name, text):
    feed(name, text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("name", TARGETS)
@COMMON
@given(seed=st.integers(0, 1 << 32))
def test_good_inputs_with_a_few_places_changed(name, seed):
    chance = random.Random(seed)
    feed(name, mutate(chance, chance.choice(TARGETS[name].seeds)))


def paths(value: object, here: tuple = ()) -> list[tuple]:
    """Return the way to every place in a document."""
    found = [here]
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        found += paths(inner, (*here, key))
    return found


def replaced(document: object, way: tuple, value: object) -> object:
    if not way:
        return value
    changed = json.loads(json.dumps(document))
    place = changed
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    return changed


@pytest.mark.parametrize("name", ["manifest", "journal", "repository", "disks", "bitmap", "graph", "event"])
@COMMON
@given(data=st.data(), value=JSON)
def test_any_value_at_any_place_of_a_document(name, data, value):
    document = json.loads(TARGETS[name].seeds[0])
    way = data.draw(st.sampled_from(paths(document)))
    feed(name, json.dumps(replaced(document, way, value)).encode())


@COMMON
@given(replies=st.fixed_dictionaries(dict.fromkeys(MACHINE, JSON)))
def test_any_answers_of_a_monitor(replies):
    feed("disks", json.dumps(replies).encode())


@COMMON
@given(
    point=st.datetimes().map(lambda when: PointId(f"{when:%Y%m%dT%H%M%SZ}".rjust(16, "0"))),
    name=NAMES,
    node=st.text(max_size=100).filter(lambda text: "\0" not in text),
    number=st.integers(0, 10_000),
    froze=st.booleans(),
)
def test_a_journal_comes_back_as_it_was(point, name, node, number, froze):
    point_time(point)
    disk = JournalDisk(DiskName(name), NodeName(node), number, None)
    journal = Journal(point, JOURNAL.vm, RepositoryId("a" * 32), "full", "x", "y", 1, (disk,), froze)
    assert Journal.from_json(journal.to_json()) == journal


@COMMON
@given(text=st.text(max_size=60))
def test_an_address_that_is_taken_is_written_as_it_is_read(text):
    try:
        address = Address.parse(text)
    except BackupctlError:
        return
    assert Address.parse(str(address)) == address


@COMMON
@given(
    text=st.from_regex(r"(qmp|agent|nbd|scratch):[a-z*]{1,9}(@.{1,8})?=[a-z-]{1,8}(:.{0,8})?", fullmatch=True)
)
def test_a_fault_that_is_taken_can_be_put_into_force(text):
    try:
        fault = faults.parse(text)
    except faults.BadFault:
        return
    made = faults.Faults()
    made.add(text)
    made.stream(1)
    made.capacity("tmp")
    made.command("qmp", "transaction")
    assert fault.text == text
    if fault.action == "late":
        assert 0 <= fault.seconds < 1e9
    if fault.where == "nbd" and fault.what in ("read", "status"):
        with pytest.raises(OSError):
            made.check_nbd(fault.what, fault.first, 1)


def test_good_answers_give_what_they_say():
    found = inventory(json.dumps(MACHINE).encode())
    (disk,) = found.disks
    assert (disk.name, disk.node, disk.size, disk.persistent) == ("vda", "n0", 1 << 20, True)
    assert disk.bitmaps == (bitmap(json.dumps(BITMAP).encode()),)
