# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples of docs/testing.md are tests, and they pass as they stand there."""

import re

import pytest

from fixtures import guest as guests
from fixtures.storage_daemon import StorageDaemon
from tests.conftest import MIB, ROOT

_KNOWN = {"pytest": pytest, "guests": guests, "StorageDaemon": StorageDaemon, "MIB": MIB}
_EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/testing.md").read_text(), re.DOTALL)


def test_there_is_an_example_of_each_part_of_the_lab():
    assert len(_EXAMPLES) == 4


for example in _EXAMPLES:
    exec(example, {**_KNOWN}, found := {})
    globals().update(found)
