# SPDX-License-Identifier: GPL-2.0-or-later
"""What `--json` prints: each report as one document. Keys are only ever added; tests pin them.

The documents are made of dicts, lists, texts and numbers alone, ready for `json.dumps`. The modules import
reports for type checks only: each command loads what it runs, and all of it would double the start of most.
"""

from backupctl.outcome.documents.backups import (
    each,
    forecast,
    forecast_skipped,
    of_each,
    recover,
    routine,
    routine_failed,
    routines,
    run,
    skipped,
)
from backupctl.outcome.documents.care import (
    bitmaps_removed,
    deletion,
    protection,
    prune,
    prune_all,
    timers,
    verify,
    vm_removal,
    vm_rename,
)
from backupctl.outcome.documents.parts import Document, error, event
from backupctl.outcome.documents.restores import (
    extracted,
    guest_files,
    mounted,
    overlay,
    places,
    restore,
    restore_in_place,
    restore_test,
    served,
)
from backupctl.outcome.documents.views import (
    bitmaps,
    diff,
    disks_kind,
    doctor,
    point,
    report,
    report_served,
    status,
    usage,
    versions,
)

__all__ = [
    "Document",
    "bitmaps",
    "bitmaps_removed",
    "deletion",
    "diff",
    "disks_kind",
    "doctor",
    "each",
    "error",
    "event",
    "extracted",
    "forecast",
    "forecast_skipped",
    "guest_files",
    "mounted",
    "of_each",
    "overlay",
    "places",
    "point",
    "protection",
    "prune",
    "prune_all",
    "recover",
    "report",
    "report_served",
    "restore",
    "restore_in_place",
    "restore_test",
    "routine",
    "routine_failed",
    "routines",
    "run",
    "served",
    "skipped",
    "status",
    "timers",
    "usage",
    "verify",
    "versions",
    "vm_removal",
    "vm_rename",
]
