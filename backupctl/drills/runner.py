# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs drills, a few at a time, each on a site of its own, and judges them."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from backupctl.cancel import Cancellation
from backupctl.drills import sites
from backupctl.drills.catalog import Drill
from backupctl.drills.fork_server import ForkServer
from backupctl.drills.site import ExpectationFailed, Site
from backupctl.errors import BackupctlError

DrillVm = Literal["simulator", "qemu"]
Verdict = Literal["passed", "FAILED", "simulator only"]
_SITES: dict[str, Callable[[Path, ForkServer], AbstractContextManager[Site]]] = {
    "simulator": sites.simulator,
    "qemu": sites.real,
}
_AT_ONCE = 4


@dataclass(frozen=True)
class Outcome:
    """The result of a drill.

    step, message, exit_code: of the run that met the fault, as shown to a user; after a kill, `message` is
    what the next run reported. compared_bytes: of all restored points, compared with the disks at their
    points in time. problem: the expectation that did not hold.
    """

    name: str
    breaks: str
    verdict: Verdict
    step: str = ""
    message: str = ""
    exit_code: int | None = None
    compared_bytes: int = 0
    problem: str = ""
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return it as JSON shows it, where the message is called "said"."""
        found = asdict(self)
        return found | {"said": found.pop("message")}


def run(drills: Sequence[Drill], vm: DrillVm, stop: Cancellation) -> Iterator[Outcome]:
    """Run the drills, and yield each outcome when it is known. Raises Interrupted."""
    with ForkServer() as fork_server, ThreadPoolExecutor(_AT_ONCE) as threads:
        coming = [threads.submit(_play, drill, vm, fork_server, stop) for drill in drills]
        try:
            for one in as_completed(coming):
                yield one.result()
        finally:
            for one in coming:
                one.cancel()


def _play(drill: Drill, vm: DrillVm, fork_server: ForkServer, stop: Cancellation) -> Outcome:
    stop.check()
    if drill.simulator_only and vm != "simulator":
        return Outcome(drill.name, drill.breaks, "simulator only")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bd-") as name, _SITES[vm](Path(name), fork_server) as site:
        problem = ""
        try:
            drill.play(site)
        except ExpectationFailed as err:
            problem = f"expected: {err}"
        except BackupctlError as err:
            problem = f"the drill could not continue: {err.message}"
        result = site.last
        return Outcome(
            drill.name,
            drill.breaks,
            "FAILED" if problem or not site.compared_bytes else "passed",
            drill.step or (result.step if result else ""),
            (result.message if result else "") or site.next_run_notes,
            result.code if result else None,
            site.compared_bytes,
            problem or ("" if site.compared_bytes else "nothing was compared"),
            time.monotonic() - begun,
        )
