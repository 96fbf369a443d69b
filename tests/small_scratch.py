# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, with scratch files that can be full, as if a guest had overwritten more than expected."""

from dataclasses import replace

from backupctl.cli.main import main
from backupctl.vm.qmp import scratch_space

RESERVED_BYTES = 1 << 20


def small() -> None:
    """Run the command line; a run reserves 1 MiB for each disk, and does not look how much of it is used."""
    real = scratch_space.plan

    def plan(*arguments, **options):
        made = real(*arguments, **options)
        return tuple(replace(one, size=RESERVED_BYTES, abort_at=None) for one in made)

    scratch_space.plan = plan
    scratch_space.RESERVE_UNLIMITED_BYTES = RESERVED_BYTES
    main()


if __name__ == "__main__":
    small()
