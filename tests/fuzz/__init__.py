# SPDX-License-Identifier: GPL-2.0-or-later
"""Every parser of what comes from outside, and what it may raise: `python -m tests.fuzz --list`.

The targets are used twice: with hypothesis in tests/unit/test_parsers.py, and for as long as one likes by the
loop in `__main__`.
"""
