# SPDX-License-Identifier: GPL-2.0-or-later
"""A victim: a simulated VM with a repository, and the command line between peers that lie."""

import fcntl
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from backupctl.drills.fork_server import CallSpec
from fixtures import fork_server
from fixtures.simulated import ROOT, Simulated
from tests.hostile.lying_peer import Lie, LyingPeer
from tests.hostile.nbd import LyingServer

SIZE = 4 << 20
MOST_SECONDS = 60.0  # what every command ends within
IMPATIENT_SECONDS = 2.0
MOST_RESIDENT = 300 << 20  # measured
MOST_WORDS = 8000
CONTROL = re.compile(r"[^\n\x20-\x7e\xa0-\U0010ffff]")


@dataclass
class Done:
    """How a command ended. resident: the most memory, in bytes, that it had."""

    code: int
    out: str
    err: str
    seconds: float
    resident: int

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.out)["error"]


class Victim:
    """A VM of one disk, a repository with one full point, and a directory that nobody may write to."""

    def __init__(self, vm: Simulated, directory: Path) -> None:
        self.vm, self.directory, self.code, self.cases = vm, directory, 0, 0
        self.most_resident = MOST_RESIDENT
        self.repository = directory / "repository"
        self.scratch = directory / "scratch"
        self.outside = directory / "outside"
        self.temporary = directory / "tmp"
        for made in (self.scratch, self.outside, self.temporary):
            made.mkdir()
        (self.outside / "precious").write_text("untouched")
        self.good("full")

    def run(
        self,
        *arguments: str,
        qmp: Path | None = None,
        agent: Path | None = None,
        vm: bool = True,
        teardown_seconds: float | None = None,
    ) -> Done:
        """Run the command line; it must end in time, within its memory, and report errors as messages.

        teardown_seconds: how long it waits for an export to go, in place of its own patience.
        """
        words = [*arguments]
        words += ["--repository", str(self.repository)] if "--repository" not in arguments else []
        if vm:
            words += ["--qmp", f"unix:{qmp or self.vm.qmp_path}"]
            words += ["--agent", f"unix:{agent or self.vm.agent_path}", "--scratch", str(self.scratch)]
        begun, peak = time.monotonic(), self.directory / "peak"
        peak.write_text("-1")
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            patience = {} if teardown_seconds is None else {"TEARDOWN_SECONDS": str(teardown_seconds)}
            environment = self._environment() | patience | {"PEAK": str(peak)}
            program = CallSpec(words, environment, str(self.outside), "tests.hostile.runner:bounded")
            with fork_server.shared().start(program, out, err) as call:
                try:
                    code = call.wait(2 * MOST_SECONDS)
                except subprocess.TimeoutExpired:
                    call.kill()
                    code = call.wait(MOST_SECONDS)
            lasted = time.monotonic() - begun
            out.seek(0), err.seek(0)
            done = Done(
                code,
                out.read().decode(errors="surrogateescape"),
                err.read().decode(),
                lasted,
                int(peak.read_text()) * 1024,
            )
        self._decent(done, raw="-" in arguments)
        return done

    def attack(
        self,
        kind: str = "incremental",
        *options: str,
        qmp: Mapping[str, Lie] | None = None,
        agent: Mapping[str, Lie] | None = None,
        nbd: LyingServer | None = None,
        seconds: float | None = IMPATIENT_SECONDS,
    ) -> Done:
        """Run a backup through lying peers, after some writes, so that there is something to lose.

        seconds: how long it waits for those that lie; None for its own time-outs, where it is to succeed. Who
        is honest is always given the time that a busy machine may need.
        """
        self.vm.control("step", count=20)
        with ExitStack() as peers:
            monitor, guest = self.vm.qmp_path, self.vm.agent_path
            if qmp is not None or nbd is not None:
                monitor = self.directory / "lying-peer.qmp"
                peers.enter_context(LyingPeer(monitor, self.vm.qmp_path, qmp or {}, nbd))
            if agent is not None:
                guest = self.directory / "lying-peer.agent"
                peers.enter_context(LyingPeer(guest, self.vm.agent_path, agent))
            patience = seconds if qmp else None
            if seconds is not None:
                options += tuple(_impatience(seconds, qmp=bool(qmp), agent=bool(agent), nbd=nbd is not None))
            words = (kind, "web", "--json", *options)
            done = self.run(*words, qmp=monitor, agent=guest, teardown_seconds=patience)
            self._settled()
            self.code = done.code
            return done

    def recovers(self, *, at_rest: bool = True) -> None:
        """Nothing is left over, and nothing was lost: the next incremental equals the guest's disk.

        The incremental follows the first of each three cases: what a case lost is missing in all later
        points, and a case that is played alone is always looked at whole. at_rest: whether all should be now.
        """
        if self.code == 3:
            assert self.run("recover", "web").code == 0
        if at_rest:
            self._at_rest()
        self.cases += 1
        if self.cases % 3 != 1:
            return
        point = self.good("incremental")["point"]
        restored = self.directory / "restored.raw"
        assert self.run("restore", "web", point, "--to", str(restored), vm=False).code == 0
        assert restored.read_bytes() == self.vm.content("vda")
        restored.unlink()
        self._at_rest()

    def _at_rest(self) -> None:
        assert self.ours() == []
        assert len(self.vm.bitmaps()["drive-vda"]) == 1
        assert self.vm.control("status")["frozen"] is False

    def _settled(self) -> None:
        """The guard may outlive the run for a while; then the guest must not be frozen."""
        deadline = time.monotonic() + 60
        while not self._unlocked():
            assert time.monotonic() < deadline, "the guard does not end"
            time.sleep(0.05)
        assert self.vm.control("status")["frozen"] is False

    def _unlocked(self) -> bool:
        with (self.repository / "web" / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def good(self, kind: str) -> Any:
        done = self.run(kind, "web", "--json")
        assert done.code == 0, done
        return json.loads(done.out)

    def ours(self) -> list[str]:
        """Return the names of what backupctl left in the VM, except bitmaps."""
        found = [node["node-name"] for node in self.vm.qmp("query-named-block-nodes", flat=True)]
        found += [one["id"] for one in self.vm.qmp("query-block-exports") + self.vm.qmp("query-jobs")]
        return [name for name in found if name.startswith("backupctl-")]

    def _environment(self) -> dict[str, str]:
        return {
            **{name: text for name, text in os.environ.items() if not name.startswith("BACKUPCTL_")},
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.outside),
            "TMPDIR": str(self.temporary),
        }

    def _decent(self, done: Done, *, raw: bool) -> None:
        assert done.seconds < MOST_SECONDS, done
        assert 0 < done.resident < self.most_resident, f"{done.resident >> 20} MiB: {done.err[-2000:]}"
        assert done.code in (0, 1, 2, 3, 4, 75), done
        assert len(done.err) < MOST_WORDS, f"{len(done.err)} characters: {done.err[:500]}"
        for text in (done.err,) if raw else (done.err, done.out):
            assert "Traceback" not in text, text[-4000:]
            assert "\nbackupctl: all is well" not in text, "a forged line"
            assert "an error in backupctl itself" not in text, text[-2000:]
            assert not CONTROL.search(text), ascii(text[-2000:])
        left = [path for path in self.outside.rglob("*") if path.name != "precious"]
        assert left == [], "written outside of repository and scratch"
        assert (self.outside / "precious").read_text() == "untouched"


def _impatience(seconds: float, *, qmp: bool, agent: bool, nbd: bool) -> Iterator[str]:
    """Yield options for the peers that lie. A monitor's lies may concern an NBD server, too."""
    lying = {"--command-timeout": qmp, "--agent-timeout": agent, "--stall-timeout": qmp or nbd}
    for option, lies in lying.items():
        if lies:
            yield from (option, str(seconds))


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One victim for all cases of a module: what a case leaves behind breaks the next."""
    with Simulated("--disk", f"vda={SIZE}", "--seed", "3") as vm:
        yield Victim(vm, tmp_path_factory.mktemp("victim"))
