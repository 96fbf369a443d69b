# SPDX-License-Identifier: GPL-2.0-or-later
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Hand out a private directory whose name is short: a unix socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="bc-") as name:
        yield Path(name)
