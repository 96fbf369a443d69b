# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading clusters for their digests only.

A read error does not end the reading: the clusters that cannot be read are returned.
"""

from collections.abc import Callable, Iterable

import numpy as np

from backupctl.digests.clusters import Clusters, Records
from backupctl.system.threads import Workers
from backupctl.transfer.batch import Part
from backupctl.transfer.copy import Copy, Wanted
from backupctl.transfer.reader import Reader


def read(
    reader: Reader,
    wanted: Iterable[Part],
    on_records: Callable[[Records], None],
    *,
    check: Callable[[], None],
    progress: Callable[[int], None],
    workers: Workers | None = None,
) -> Clusters:
    """Read clusters and pass their records to `on_records`; returns those that cannot be read.

    on_records: called in worker threads, with the records of some clusters at a time. check: called at
    least every 100 ms; what it raises ends the reading. progress: called with the bytes done. workers: as for
    Copy. Raises ReadFailed when the server is lost.
    """
    failed: list[Clusters] = [np.empty(0, np.uint64)]

    def pass_nothing(found: Records) -> Wanted:
        on_records(found)
        nothing = np.zeros(len(found), np.bool_)
        return Wanted(nothing, nothing)

    Copy(
        reader,
        None,
        check=check,
        progress=progress,
        filter_records=pass_nothing,
        on_unreadable=failed.append,
        workers=workers,
    ).run(wanted)
    return np.sort(np.concatenate(failed))
