# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripts, one module per subject; importing this package registers them all."""

from tests.conformance.scripts import (  # noqa: F401 - imported for what they register
    bitmaps,
    contents,
    descriptors,
    exports,
    graph,
    jobs,
    limits,
    machine,
    monitor,
    plugging,
    restarts,
    transactions,
    views,
    wire,
)
