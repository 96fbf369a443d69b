# SPDX-License-Identifier: GPL-2.0-or-later
"""The drills: what each one breaks, and what must hold afterwards.

Each starts with a full and some writes, breaks one thing, and ends with `check_next_run`: the next
incremental succeeds, every point restores byte for byte, and backupctl has left nothing in the VM.
"""

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from backupctl.drills.site import VM, Site, await_line, expect
from backupctl.drills.sites import DISKS, SimulatorSite

Play = Callable[[Site], None]
STEPS = ("attach", "freeze", "transaction", "export", "copy", "dismantle", "commit", "settle")
"""The steps of a run, in order; `settle` comes after the commit."""
_IN_DATA = 65536 * 3 // 2
"""A byte of an image that holds data: the clusters of the disk follow that of the header."""
SLOW = ("--limit", "200k")  # slow enough to be interrupted in the copy


@dataclass(frozen=True)
class Drill:
    """One drill.

    breaks: what it breaks, for a reader. simulator_only: a real QEMU cannot be made to do it. step: at which
    the run is broken, if the run itself cannot report that.
    """

    name: str
    breaks: str
    play: Play
    simulator_only: bool = False
    step: str = ""


def _prepare(site: Site) -> None:
    """Make a full, then some writes."""
    site.write(40)
    site.backup("full")
    site.commit_known()
    site.write(20)


@contextmanager
def _copying(kind: str, site: Site) -> Iterator[subprocess.Popen[str]]:
    """Yield a slow run that has begun to copy."""
    with site.start(kind, VM, *site.options, *SLOW) as run:
        assert run.stderr is not None
        await_line(run.stderr, "copy")
        yield run


def _killed(kind: str, step: str, site: Site) -> None:
    _prepare(site)
    site.fails(kind, codes=(-signal.SIGKILL,), fault=step)
    site.await_thaw()  # by the guard: the run is dead
    site.write(5)
    site.check_next_run()


def _signalled(number: int, site: Site) -> None:
    _prepare(site)
    with _copying("incremental", site) as run:
        run.send_signal(number)
        result = site.last = site.wait(run)
    expect(result.code == 1, f"the run rolls back and ends with 1, not {result.code}")
    site.check_clean()
    site.check_next_run()


def _faulty(spec: str, codes: tuple[int, ...], site: Site, *options: str) -> None:
    assert isinstance(site, SimulatorSite)
    _prepare(site)
    site.order("fault", spec=spec)
    result = site.fails("incremental", *options, codes=codes, fault="impatient")
    site.order("clear-faults")
    expect(result.code == 0 or result.message, "the error is reported")
    expect(not site.guest_failure(), f"the guest did not fail ({site.guest_failure()})")
    site.check_next_run()


def _qemu_ends(how: str, site: Site) -> None:
    _prepare(site)
    with _copying("incremental", site) as run:
        site.end(how)
        result = site.last = site.wait(run)
    expect(result.code in (1, 3), f"the run ends with 1 or 3, not {result.code}")
    site.restart()
    site.check_next_run()


def _two_runs(site: Site) -> None:
    _prepare(site)
    with _copying("full", site) as run:
        site.fails("incremental", codes=(75,))
        run.send_signal(signal.SIGTERM)
        first = site.wait(run)
    expect(first.code == 1, "the first run continues until it is stopped")
    site.check_next_run()


def _target_full(site: Site) -> None:
    _prepare(site)
    result = site.fails("full", fault="full-disk")
    expect(result.message, "the error is reported")
    site.check_clean()
    site.check_next_run()


def _damaged_manifest(site: Site) -> None:
    _prepare(site)
    (manifest,) = (site.repository / VM).glob("*Z/manifest.json")
    content = bytearray(manifest.read_bytes())
    content[len(content) // 2] ^= 1
    manifest.write_bytes(content)
    point = manifest.parent.name
    for arguments in (
        ("list", VM),
        ("verify", VM),
        ("restore", VM, point, "--to", str(site.directory / "x")),
    ):
        result = site.last = site.run(*arguments)
        expect(result.code == 4, f"{arguments[0]} ends with 4, not {result.code}")
    del site.moments[point]
    site.commit_known()  # with the damage made above
    site.check_next_run(code=4)


def _damaged_data(site: Site) -> None:
    _prepare(site)
    (image,) = (site.repository / VM).glob("*Z/vda.qcow2")
    content = bytearray(image.read_bytes())
    content[_IN_DATA] ^= 1
    image.write_bytes(content)
    arguments = ("restore", VM, "latest", "--disk", "vda", "--to", str(site.directory / "x.raw"))
    expect(site.run("verify", VM).code == 4, "verify ends with 4")
    site.last = site.run(*arguments)
    expect(site.last.code == 4, f"restore ends with 4, not {site.last.code}")
    expect(not (site.directory / "x.raw").exists(), "no damaged data are restored")
    content[_IN_DATA] ^= 1
    image.write_bytes(content)
    site.check_next_run()


def _snapshot(site: Site) -> None:
    _prepare(site)
    site.snapshot("vda", DISKS["vda"])
    site.check_next_run()
    site.check_next_run()


def _resized(site: Site) -> None:
    _prepare(site)
    site.resize("vda", 6 << 20)
    site.resize("vda", 12 << 20)
    site.check_next_run()


def _added(site: Site) -> None:
    _prepare(site)
    site.add_disk("vdc", 4 << 20)
    site.check_next_run()


def _bitmap_removed(site: Site) -> None:
    _prepare(site)
    nodes = site.query("query-named-block-nodes", flat=True)
    (name,) = (
        bitmap["name"]
        for node in nodes
        if node["node-name"] == "node-vda"
        for bitmap in node["dirty-bitmaps"]
    )
    site.query("block-dirty-bitmap-remove", node="node-vda", name=name)
    site.check_next_run()


def _job_ended(site: Site) -> None:
    _prepare(site)
    with _copying("incremental", site) as run:
        for job in site.query("query-jobs"):
            site.query("block-job-cancel", device=job["id"], force=True)
        result = site.last = site.wait(run)
    expect(result.code == 1, f"the run rolls back and ends with 1, not {result.code}")
    site.check_clean()
    site.check_next_run()


def _on_simulator(name: str, breaks: str, spec: str, *codes: int, options: tuple[str, ...] = ()) -> Drill:
    def play(site: Site) -> None:
        _faulty(spec, codes, site, *options)

    return Drill(name, breaks, play, simulator_only=True)


def _kill(kind: str, step: str) -> Drill:
    return Drill(
        f"kill-{kind}-{step}",
        f"SIGKILL of a run ({kind})",
        partial(_killed, kind, step),
        simulator_only=step == "freeze",  # without a guest nothing is frozen
        step=step,
    )


DRILLS: tuple[Drill, ...] = (
    *(_kill(kind, step) for kind in ("full", "incremental") for step in STEPS),
    Drill("sigterm", "SIGTERM in mid-copy", partial(_signalled, signal.SIGTERM)),
    Drill("sigint", "Ctrl-C in mid-copy", partial(_signalled, signal.SIGINT)),
    _on_simulator("agent-hangs", "the agent never answers", "agent:*@*=silent", 1),
    _on_simulator("agent-refuses", "the agent refuses to freeze", "agent:guest-fsfreeze-freeze=error", 1),
    _on_simulator("agent-frozen", "frozen, and no answer", "agent:guest-fsfreeze-freeze=unanswered", 1),
    _on_simulator("agent-dies", "the agent hangs up on the thaw", "agent:guest-fsfreeze-thaw=hangup", 1),
    _on_simulator("nbd-drops", "the NBD connection breaks in mid-copy", "nbd:sent@300k=drop", 1),
    _on_simulator("nbd-stalls", "the NBD server falls silent", "nbd:sent@300k=stall", 1),
    _on_simulator("nbd-lies", "the NBD server sends garbage", "nbd:sent@300k=garbage", 1),
    _on_simulator("nbd-short", "the NBD server sends less than it says", "nbd:sent@300k=short", 1),
    _on_simulator("read-error", "a disk that can't be read everywhere", "nbd:read@0-16M=error:EIO", 1),
    _on_simulator("monitor-hangs", "the monitor never answers", "qmp:block-export-add=silent", 1, 3),
    _on_simulator("monitor-lost", "the monitor hangs up before the moment", "qmp:transaction=hangup", 1),
    _on_simulator("reply-lost", "the moment was taken, its reply is lost", "qmp:transaction=lost", 1),
    _on_simulator("reply-lost-scratch", "the scratch node's reply is lost", "qmp:blockdev-add=lost", 1),
    _on_simulator("reply-lost-export", "the export's reply is lost", "qmp:block-export-add=lost", 1),
    _on_simulator("reply-lost-job", "the reply to ending the job is lost", "qmp:block-job-cancel=lost", 1),
    _on_simulator(
        "scratch-full",
        "the scratch file can't grow",
        "scratch:backupctl-*=full:600k",
        1,
        options=("--view", "snapshot-access", *SLOW),
    ),
    Drill("target-full", "the repository's disk is full", _target_full),
    Drill("qemu-crashes", "QEMU dies in mid-copy", partial(_qemu_ends, "kill")),
    Drill("qemu-restarts", "QEMU ends cleanly in mid-copy", partial(_qemu_ends, "quit")),
    Drill("two-runs", "two runs at once", _two_runs),
    Drill("damaged-manifest", "a flipped bit in a manifest", _damaged_manifest),
    Drill("damaged-data", "a flipped bit in a stored image", _damaged_data),
    Drill("snapshot", "an external snapshot between two backups", _snapshot),
    Drill("resized", "a disk shrunk and grown between two backups", _resized),
    Drill("disk-added", "a disk added between two backups", _added),
    Drill("job-ended", "somebody ends the backup job in mid-copy", _job_ended),
    Drill("bitmap-removed", "somebody removed the bitmap", _bitmap_removed),
)
