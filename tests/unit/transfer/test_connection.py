# SPDX-License-Identifier: GPL-2.0-or-later
"""What one NBD connection looks at of its own process."""

from backupctl.transfer.connection import _memory_bytes

MIB = 1 << 20


def test_what_a_process_once_had_does_not_hide_what_a_greeting_takes():
    once = b"x" * (256 * MIB)
    del once
    before = _memory_bytes()
    taken = b"x" * (128 * MIB)
    assert 100 * MIB < _memory_bytes() - before < 200 * MIB
    del taken
