# SPDX-License-Identifier: GPL-2.0-or-later
"""The differences that are allowed, each with its reason. The README's table is checked against this list."""

from conformance.compare import Difference


def allowed(script: str, pair: tuple[str, str], difference: Difference) -> bool:
    """Whether a difference is on the list."""
    return False
