# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a VM can't be backed up, as far as QEMU can tell before anything of it is touched."""

from backupctl.errors import UNTOUCHED, Refused
from backupctl.vm.qmp.monitor import Monitor
from backupctl.vm.qmp.reply import text, understood

_GONE = {
    "inmigrate": "is still on its way to this QEMU",
    "postmigrate": "has gone to another QEMU, or to a file",
}
_AT_REST = frozenset({"none", "completed", "failed", "cancelled"})


def refuse_qemu(monitor: Monitor) -> None:
    """Raise Refused if this QEMU is too old, or would come to harm by its own backup. Raises MonitorError."""
    if not monitor.version.at_least(5, 2):
        raise Refused(f"QEMU {monitor.version} is too old: 5.2 is needed", state=UNTOUCHED)
    _refuse_migrating(monitor)
    if monitor.version.at_least(8, 1):
        _refuse_fuse(monitor)


def _refuse_migrating(monitor: Monitor) -> None:
    """Raise Refused if the VM is not, or not for long, this QEMU's.

    Another may be writing to its disks: what this one has kept of an image's tables is of earlier, and would
    make a point of old and new bytes (10.0.2 refuses that itself, 7.2.22 does not). And a migration that
    ends while we have a job or filter over a disk fails (docs/protocol.md, "Unexpected behaviour of QEMU").
    """
    if "query-migrate" not in monitor.commands:  # no VM, but a storage daemon
        return
    status, migration = monitor.execute("query-status"), monitor.execute("query-migrate")
    with understood("query-status and query-migrate"):
        state, moves = text(status["status"]), text(migration.get("status", "none"))
    if state in _GONE:
        raise Refused(f"the VM {_GONE[state]}: it was migrated ({state})", state=UNTOUCHED)
    if moves not in _AT_REST:
        raise Refused(
            f"a migration of the VM is under way ({moves}), which a backup would make fail", state=UNTOUCHED
        )


def _refuse_fuse(monitor: Monitor) -> None:
    """Raise Refused if this QEMU exports anything by FUSE: it may hang for ever when an export of ours ends.

    From 8.1 on a FUSE export is busy until the request at hand is done, and waits for it in an event loop
    within QEMU's own. An export of ours that is taken down in there waits for the request, which waits for
    it (upstream's issue 2179; seen under load in about one run in three on 10.0.2, in none of 120 on 7.2.22).
    """
    exports = monitor.execute("query-block-exports")
    with understood("query-block-exports"):
        for export in exports:
            if export["type"] == "fuse":
                node = text(export["node-name"])
                raise Refused(
                    f"{node} is exported by FUSE, and QEMU {monitor.version} may hang, with all its disks, "
                    "when the view of a backup is taken down; export it by vhost-user-blk",
                    state=UNTOUCHED,
                )
