# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs drills, a few at once, each on a ground of its own, and judges them."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backupctl.cancel import Cancellation
from backupctl.drills import sites
from backupctl.drills.catalog import Drill
from backupctl.drills.fork_server import ForkServer
from backupctl.drills.site import ExpectationFailed, Site
from backupctl.errors import BackupctlError

Place = Literal["simulator", "qemu"]
Verdict = Literal["passed", "FAILED", "simulator only"]
_GROUNDS: dict[str, Callable[[Path, ForkServer], AbstractContextManager[Site]]] = {
    "simulator": sites.simulator,
    "qemu": sites.real,
}
_AT_ONCE = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a drill.

    step, said, exit_code: of the run that met the fault, as a user saw it; of one that was killed, what the
    next one said. compared_bytes: of all points,
    restored and compared with their moments. problem: what was to be true, and is not.
    """

    name: str
    breaks: str
    verdict: Verdict
    step: str = ""
    said: str = ""
    exit_code: int | None = None
    compared_bytes: int = 0
    problem: str = ""
    seconds: float = 0.0


def run(drills: Sequence[Drill], place: Place, stop: Cancellation) -> Iterator[Outcome]:
    """Play the drills; yields each outcome as it is there. Raises Interrupted."""
    with ForkServer() as warm, ThreadPoolExecutor(_AT_ONCE) as threads:
        coming = [threads.submit(_play, drill, place, warm, stop) for drill in drills]
        try:
            for one in as_completed(coming):
                yield one.result()
        finally:
            for one in coming:
                one.cancel()


def _play(drill: Drill, place: Place, warm: ForkServer, stop: Cancellation) -> Outcome:
    stop.check()
    if drill.simulator_only and place != "simulator":
        return Outcome(drill.name, drill.breaks, "simulator only")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bd-") as name, _GROUNDS[place](Path(name), warm) as ground:
        problem = ""
        try:
            drill.play(ground)
        except ExpectationFailed as err:
            problem = f"not so: {err}"
        except BackupctlError as err:
            problem = f"the drill itself could not go on: {err.message}"
        said = ground.last
        return Outcome(
            drill.name,
            drill.breaks,
            "FAILED" if problem or not ground.compared_bytes else "passed",
            drill.step or (said.step if said else ""),
            (said.message if said else "") or ground.aftermath,
            said.code if said else None,
            ground.compared_bytes,
            problem or ("" if ground.compared_bytes else "not a byte was compared"),
            time.monotonic() - begun,
        )
