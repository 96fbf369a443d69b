# SPDX-License-Identifier: GPL-2.0-or-later
"""The drills: what is broken, and what must be true then.

Each begins with a full and some writes, breaks one thing, and ends with `next_is_right`: the next incremental
succeeds, every point restores to the bytes of its moment, and nothing of backupctl's is left in the VM.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from backupctl.drills.site import VM, Site, await_line, expect
from backupctl.drills.sites import DISKS, SimulatorSite

Play = Callable[[Site], None]
STEPS = ("attach", "freeze", "transaction", "export", "copy", "dismantle", "commit", "settle")
"""Of a run, in their order; `settle` is what comes after the commit."""
SLOW = ("--limit", "200k")  # slow enough to be met in mid-copy


@dataclass(frozen=True)
class Drill:
    """One drill.

    breaks: what is broken, in words. simulator_only: whether a real QEMU can't be made to do it. step: at
    which it is broken, where the tool can't tell.
    """

    name: str
    breaks: str
    play: Play
    simulator_only: bool = False
    step: str = ""


def begun(ground: Site) -> None:
    """A full, and changes since."""
    ground.write(40)
    ground.backup("full")
    ground.commit_known()
    ground.write(20)


def _killed(kind: str, step: str, ground: Site) -> None:
    begun(ground)
    ground.fails(kind, codes=(-signal.SIGKILL,), doomed=step)
    ground.await_thaw()  # the guard's work: the run can do nothing more
    ground.write(5)
    ground.next_is_right()


def _signalled(number: int, ground: Site) -> None:
    begun(ground)
    with ground.start("incremental", VM, *ground.options, *SLOW) as run:
        assert run.stderr is not None
        await_line(run.stderr, "copy")
        run.send_signal(number)
        said = ground.last = ground.wait(run)
    expect(said.code == 1, f"it rolls back and ends with 1, not {said.code}")
    ground.at_rest()
    ground.next_is_right()


def _faulty(spec: str, codes: tuple[int, ...], ground: Site, *options: str) -> None:
    assert isinstance(ground, SimulatorSite)
    begun(ground)
    ground.order("fault", spec=spec)
    said = ground.fails("incremental", *options, codes=codes, doomed="impatient")
    ground.order("clear-faults")
    expect(said.code == 0 or said.message, "what failed is told")
    expect(not ground.harmed(), f"the guest is not harmed ({ground.harmed()})")
    ground.next_is_right()


def _qemu_ends(how: str, ground: Site) -> None:
    begun(ground)
    with ground.start("incremental", VM, *ground.options, *SLOW) as run:
        assert run.stderr is not None
        await_line(run.stderr, "copy")
        ground.end(how)
        said = ground.last = ground.wait(run)
    expect(said.code in (1, 3), f"it ends with 1 or 3, not {said.code}")
    ground.restart()
    ground.next_is_right()


def _two_runs(ground: Site) -> None:
    begun(ground)
    with ground.start("full", VM, *ground.options, *SLOW) as run:
        assert run.stderr is not None
        await_line(run.stderr, "copy")
        ground.fails("incremental", codes=(75,))
        run.send_signal(signal.SIGTERM)
        first = ground.wait(run)
    expect(first.code == 1, "the first run goes on, until it is ended")
    ground.next_is_right()


def _target_full(ground: Site) -> None:
    begun(ground)
    said = ground.fails("full", doomed="full-disk")
    expect(said.message, "what failed is told")
    ground.at_rest()
    ground.next_is_right()


def _damaged_manifest(ground: Site) -> None:
    begun(ground)
    (manifest,) = (ground.repository / VM).glob("*Z/manifest.json")
    content = bytearray(manifest.read_bytes())
    content[len(content) // 2] ^= 1
    manifest.write_bytes(content)
    point = manifest.parent.name
    for arguments in (("list", VM), ("verify", VM), ("restore", VM, point, "--to", str(ground.folder / "x"))):
        said = ground.last = ground.run(*arguments)
        expect(said.code == 4, f"{arguments[0]} ends with 4, not {said.code}")
    del ground.moments[point]
    ground.commit_known()  # as we damaged it
    ground.next_is_right(code=4)


def _damaged_data(ground: Site) -> None:
    begun(ground)
    (image,) = (ground.repository / VM).glob("*Z/vda.qcow2")
    content = bytearray(image.read_bytes())
    content[-65536 // 2] ^= 1
    image.write_bytes(content)
    arguments = ("restore", VM, "latest", "--disk", "vda", "--to", str(ground.folder / "x.raw"))
    expect(ground.run("verify", VM).code == 4, "verify ends with 4")
    ground.last = ground.run(*arguments)
    expect(ground.last.code == 4, f"restore ends with 4, not {ground.last.code}")
    expect(not (ground.folder / "x.raw").exists(), "nothing damaged is restored")
    content[-65536 // 2] ^= 1
    image.write_bytes(content)
    ground.next_is_right()


def _snapshot(ground: Site) -> None:
    begun(ground)
    ground.snapshot("vda", DISKS["vda"])
    ground.next_is_right()
    ground.next_is_right()


def _resized(ground: Site) -> None:
    begun(ground)
    ground.resize("vda", 6 << 20)
    ground.resize("vda", 12 << 20)
    ground.next_is_right()


def _added(ground: Site) -> None:
    begun(ground)
    ground.add_disk("vdc", 4 << 20)
    ground.next_is_right()


def _bitmap_removed(ground: Site) -> None:
    begun(ground)
    nodes = ground.query("query-named-block-nodes", flat=True)
    (name,) = (
        bitmap["name"]
        for node in nodes
        if node["node-name"] == "node-vda"
        for bitmap in node["dirty-bitmaps"]
    )
    ground.query("block-dirty-bitmap-remove", node="node-vda", name=name)
    ground.next_is_right()


def _job_ended(ground: Site) -> None:
    begun(ground)
    with ground.start("incremental", VM, *ground.options, *SLOW) as run:
        assert run.stderr is not None
        await_line(run.stderr, "copy")
        for job in ground.query("query-jobs"):
            ground.query("block-job-cancel", device=job["id"], force=True)
        said = ground.last = ground.wait(run)
    expect(said.code == 1, f"it rolls back and ends with 1, not {said.code}")
    ground.at_rest()
    ground.next_is_right()


def _on_simulator(name: str, breaks: str, spec: str, *codes: int, options: tuple[str, ...] = ()) -> Drill:
    def play(ground: Site) -> None:
        _faulty(spec, codes, ground, *options)

    return Drill(name, breaks, play, simulator_only=True)


def _kill(kind: str, step: str) -> Drill:
    return Drill(
        f"kill-{kind}-{step}",
        f"SIGKILL of a run ({kind})",
        partial(_killed, kind, step),
        simulator_only=step == "freeze",  # without a guest there is nothing to freeze
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
