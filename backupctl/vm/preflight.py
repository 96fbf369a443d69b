# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a VM can't be backed up, as far as QEMU can tell before anything of it is touched."""

from backupctl.errors import Refused
from backupctl.vm.disks import Inventory
from backupctl.vm.monitor import Monitor
from backupctl.vm.reply import text, understood

_UNTOUCHED = "nothing was touched"
_MIGRATING = {
    "inmigrate": "is still on its way to this QEMU",
    "finish-migrate": "is on its way to another QEMU",
    "postmigrate": "has gone to another QEMU, or to a file",
}


def refuse_qemu(monitor: Monitor) -> None:
    """Raise Refused if this QEMU is too old, or would come to harm by its own backup. Raises MonitorError."""
    if not monitor.version.at_least(5, 2):
        raise Refused(f"QEMU {monitor.version} is too old: 5.2 is needed", state=_UNTOUCHED)
    if "query-status" in monitor.commands:
        _refuse_migrating(monitor)
    if monitor.version.at_least(8, 1):
        _refuse_fuse(monitor)


def refuse_busy(inventory: Inventory) -> None:
    """Raise Refused if somebody's job works on a disk."""
    for name, driver in inventory.busy:
        raise Refused(f"another job works on {name}: its top node is a {driver}", state=_UNTOUCHED)


def _refuse_migrating(monitor: Monitor) -> None:
    """Raise Refused if the VM is not this QEMU's: another may be writing to its disks.

    What this one has kept of an image's tables is of earlier, and would make a point of old and new bytes.
    QEMU itself refuses it in newer versions only (10.0.2, not 7.2.22).
    """
    told = monitor.execute("query-status")
    with understood("query-status"):
        state = text(told["status"])
    if state in _MIGRATING:
        raise Refused(f"the VM {_MIGRATING[state]}: it is migrated ({state})", state=_UNTOUCHED)


def _refuse_fuse(monitor: Monitor) -> None:
    """Raise Refused if this QEMU exports anything by FUSE: it may hang for ever when an export of ours ends.

    From 8.1 on a FUSE export is busy until the request at hand is done, and waits for it in an event loop
    within QEMU's own. An export of ours that is taken down in there waits for the request, which waits for
    it (upstream's issue 2179; measured under load: about one run in three on 10.0.2, none of 120 on 7.2.22).
    """
    exports = monitor.execute("query-block-exports")
    with understood("query-block-exports"):
        for export in exports:
            if export["type"] == "fuse":
                node = text(export["node-name"])
                raise Refused(
                    f"{node} is exported by FUSE, and QEMU {monitor.version} may hang, with all its disks, "
                    "when the view of a backup is taken down; export it by vhost-user-blk",
                    state=_UNTOUCHED,
                )
