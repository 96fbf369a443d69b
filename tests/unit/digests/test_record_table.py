# SPDX-License-Identifier: GPL-2.0-or-later
import os
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupctl.digests import record_table
from backupctl.digests.clusters import blank
from backupctl.digests.record_table import RecordTable
from backupctl.errors import WriteFailed


def records_of(first: int, length: int):
    found = blank(first, length)
    found["low"] = found["cluster"] + 7
    return found


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_whatever_the_order_all_come_back_once_and_ascending(lengths, rng):
    firsts = np.cumsum([0, *lengths]).tolist()
    pieces = [records_of(first, length) for first, length in zip(firsts[:-1], lengths, strict=True)]
    rng.shuffle(pieces)
    with patch.object(record_table, "MOST_IN_MEMORY", 7):
        table = RecordTable()
        for piece in pieces:
            table.add(piece)
        assert table.count == sum(lengths)
        for _ in range(2):  # a digest map is hashed first, and then written
            found = np.concatenate(list(table.parts()))
            assert found.tolist() == records_of(0, sum(lengths)).tolist()


def test_no_records_are_no_parts():
    assert list(RecordTable().parts()) == []


def test_a_full_file_system_is_a_write_error_that_says_so(tmp_path):
    def full(_descriptor, _content):
        raise OSError(28, os.strerror(28))

    table = RecordTable(tmp_path)
    with (
        patch.object(record_table, "MOST_IN_MEMORY", 2),
        patch.object(os, "write", full),
        pytest.raises(WriteFailed, match="cannot store the digests: No space left"),
    ):
        table.add(records_of(0, 3))
