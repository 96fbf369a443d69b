# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of what we have in QEMU: what each is for, and what goes before what."""

import pytest

from backupctl.names import Namespace, NodeKind, node_parts, removal_order, sibling

OURS = Namespace("0123abcd")


@pytest.mark.parametrize("kind", NodeKind)
def test_a_name_tells_its_kind_and_its_disk(kind):
    assert node_parts(OURS.node(kind, 12)) == (kind, 12)


@pytest.mark.parametrize(
    "name", ["tmp0", "backupctl-0123abcd-tmp", "backupctl-0123abcd-since", "backupctl-x-tmp0"]
)
def test_any_other_name_tells_nothing(name):
    assert node_parts(name) is None
    with pytest.raises(ValueError, match="not a name of backupctl"):
        sibling(name, NodeKind.LIMIT)


def test_what_belongs_to_the_same_disk_is_found_by_the_name():
    assert sibling(OURS.node(NodeKind.JOB, 3), NodeKind.LIMIT) == OURS.node(NodeKind.LIMIT, 3)


def test_a_node_is_removed_before_those_that_it_is_on_top_of():
    """A snapshot-access node is on its filter, and that on its scratch node; disk 10 after disk 2."""
    kinds = (NodeKind.ACCESS, NodeKind.FILTER, NodeKind.SCRATCH, NodeKind.FILE)
    wanted = [OURS.node(kind, number) for kind in kinds for number in (2, 10)]
    mixed = [*wanted[3:], *wanted[:3]]
    assert sorted(mixed, key=removal_order) == wanted
    strange = f"{OURS.prefix}other"
    assert max([strange, *wanted], key=removal_order) == strange
