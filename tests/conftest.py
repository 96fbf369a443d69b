# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures: QEMU builds, machines, the command line. Each hands out things not yet started and ends them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from backupctl.drills.fork_server import CLI, CallSpec
from fixtures import builds, fork_server, fuse
from fixtures.agent import PlayedAgent
from fixtures.builds import Build
from fixtures.debian import CannotBeHad
from fixtures.libvirtd import Libvirtd
from fixtures.machine import Disk, Machine
from fixtures.simulated import SimulatedMachine
from fixtures.simulated_guest import SimulatedAgent, SimulatedWriter
from fixtures.writer import Writer

# A loaded machine is no bug: Hypothesis would fail a case that takes 200 ms once and 1 ms the next time.
hypothesis.settings.register_profile("backupctl", deadline=None)
hypothesis.settings.load_profile("backupctl")

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a temporary directory of its own: what killed processes leave goes with it."""
    if hasattr(config, "workerinput"):
        return  # a worker of xdist has inherited it
    root = _temporary_root()
    # pytest keeps its own directories, which show what failed.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", root)
    directory = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="bt-", dir=root)
    os.environ["STATE_DIRECTORY"] = f"{directory}/state"  # not this machine's own
    Path(directory).chmod(0o1777)  # like the system's own: a QEMU of another user has its sockets there, too
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))


def _temporary_root() -> str:
    """Return where temporary files go: to a disk. Debian 13 has /tmp in memory, which has other manners."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    in_memory = ["/tmp", "tmpfs"] in mounts and "TMPDIR" not in os.environ
    return "/var/tmp" if in_memory else tempfile.gettempdir()


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Take back the umask of a command line that a test ran in this process, before the next test."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def get_build(which: str) -> Build:
    """Return a build as `builds.build` does; one that can't be had skips the test, or fails if required."""
    try:
        return builds.build(which)
    except CannotBeHad as err:
        needed = builds.required()
        if which in needed or (needed and which in builds.CHOICES):
            pytest.fail(f"QEMU {which} is required here: {err}")
        pytest.skip(f"QEMU {which} can't be had: {err}")


SIMULATOR = "simulator"
_PLAYED_ON = {
    "build": ("oldest", "newest"),
    "each_build": builds.versions(),
    "any_build": ("installed",),
    "oldest_build": (builds.VERSIONS[0],),
    "newest_build": ("newest",),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Play a test on the QEMUs of its fixture, and on the simulator if it is marked `simulator_too`.

    Not on the simulator what `needs_qemu`.
    """
    marked = metafunc.definition.get_closest_marker
    too = [SIMULATOR] if marked("simulator_too") and not marked("needs_qemu") else []
    for name, choices in _PLAYED_ON.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [*choices, *too], indirect=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up the cases that tests played, each told by `record_property("cases", (what, how many))`."""
    played: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            if name == "cases":
                played[value[0]] += value[1]
    if played:
        terminalreporter.section("cases played, all right")
    for what, number in sorted(played.items()):
        terminalreporter.line(f"{number:8,} {what}")


def _chosen(request: pytest.FixtureRequest, posing_as: str) -> Build:
    if request.param != SIMULATOR:
        return get_build(request.param)
    try:
        return builds.simulator(posing_as)
    except CannotBeHad as err:
        pytest.skip(str(err))


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Build:
    """The oldest QEMU and the newest, for what may depend on the version; then perhaps the simulator."""
    made = _chosen(request, builds.NEWEST)
    if request.param == "newest" and made == get_build("oldest"):
        pytest.skip(f"QEMU {made.version} is the only one here")
    return made


@pytest.fixture
def each_build(request: pytest.FixtureRequest) -> Build:
    """Each QEMU in turn, for what shows how each version behaves; then perhaps the simulator."""
    return _chosen(request, builds.NEWEST)


@pytest.fixture
def any_build(request: pytest.FixtureRequest) -> Build:
    """The installed QEMU, for what does not depend on the version; then perhaps the simulator."""
    return _chosen(request, builds.VERSIONS[0])


@pytest.fixture
def oldest_build(request: pytest.FixtureRequest) -> Build:
    """QEMU 7.2, for what later ones do otherwise; then perhaps the simulator, posing as that one."""
    return _chosen(request, builds.VERSIONS[0])


@pytest.fixture
def newest_build(request: pytest.FixtureRequest) -> Build:
    """The newest QEMU, for what older ones cannot do; then perhaps the simulator, posing as that one."""
    return _chosen(request, builds.NEWEST)


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """What a test starts, ended in the opposite order."""
    with ExitStack() as stack:
        yield stack


SECONDS = 120


def pytest_sessionfinish() -> None:
    """End the fork server."""
    fork_server.close()


@dataclass
class Cli:
    """The command line, as a user runs it. Every call has a time-out."""

    repository: Path
    environment: dict[str, str]
    scratch: Path
    vm: list[str] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)

    def arguments(self, *arguments: str, vm: bool = True) -> list[str]:
        found = [*arguments, "--repository", str(self.repository)]
        return found + ([*self.vm, "--scratch", str(self.scratch)] if vm else [])

    def command(self, *arguments: str, vm: bool = True) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "backupctl", *self.arguments(*arguments, vm=vm)]

    def call(
        self, *arguments: str, vm: bool = True, entry: str = CLI, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Make a call, by another entry than the command line's own perhaps, whatever comes of it."""
        called, around = self.arguments(*arguments, vm=vm), {**self.environment, **environment}
        return fork_server.shared().run(CallSpec(called, around, str(ROOT), entry), SECONDS)

    def run(self, *arguments: str, code: int = 0, vm: bool = True) -> "subprocess.CompletedProcess[str]":
        if self.prefix:
            done = subprocess.run(
                self.command(*arguments, vm=vm),
                env=self.environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        else:
            done = self.call(*arguments, vm=vm)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str, code: int = 0, vm: bool = True) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code, vm=vm).stdout)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def raw(self, point: str, disk: str, directory: Path) -> bytes:
        """Return the bytes of a disk at a point, restored."""
        target = directory / f"{disk}-{time.monotonic_ns()}.raw"
        self.run("restore", "web", point, "--to", str(target), "--disk", disk, vm=False)
        content = target.read_bytes()
        target.unlink()
        return content


Agent = PlayedAgent | SimulatedAgent


@dataclass
class Lab:
    """A machine without guest, or the simulator; its agent and writer, and the command line for it."""

    machine: Machine
    agent: Agent
    writer: Writer
    cli: Cli
    directory: Path

    def backup(self, kind: str, *options: str, code: int = 0) -> Any:
        return self.cli.json(kind, "web", *options, code=code)

    def assert_points_under_writes(self, *kinds: str, options: Sequence[str] = ()) -> None:
        """Each point that is made while the guest writes is byte-equal to its moment."""
        self.writer.start()
        moments = {}
        for kind in kinds:
            report = self.backup(kind, *options)
            moments[report["point"]] = self.writer.moment
        self.writer.stop()
        self.assert_at_rest()
        for point, moment in moments.items():
            self.assert_point(point, moment)

    def assert_point(self, point: str, moment: dict[str, bytes]) -> None:
        """The point is byte-equal to the moment, by restore and by qemu-img straight from the repository."""
        for disk, content in moment.items():
            assert self.cli.raw(point, disk, self.directory) == content, f"{disk} of {point} by restore"
            raw = self.directory / "convert.raw"
            image = self.cli.repository / "web" / point / f"{disk}.qcow2"
            subprocess.run(
                [self.machine.build.tool("qemu-img"), "convert", "-O", "raw", image, raw],
                check=True,
                timeout=60,
            )
            assert raw.read_bytes() == content, f"{disk} of {point} by qemu-img convert"

    def assert_at_rest(self, bitmaps_each: int | None = 1) -> None:
        """Nothing of ours is left in QEMU but bitmaps (None: however many), nothing on disk but points."""
        assert self.machine.leftovers() == []
        for disk in self.machine.disks:
            ours = [
                name for name in self.machine.bitmaps().get(disk.node, []) if name.startswith("backupctl-")
            ]
            assert bitmaps_each in (None, len(ours)), ours
        directory = self.cli.repository / "web"
        if directory.exists():
            assert [name for name in os.listdir(directory) if name.endswith(".partial")] == []
        assert list(self.cli.scratch.iterdir()) == []
        assert not self.agent.frozen

    def next_is_right(self) -> None:
        """After whatever happened: an incremental is byte-equal to its moment, and all is at rest."""
        self.writer.write(5)
        report = self.backup("incremental")
        self.assert_point(report["point"], self.writer.moment)
        self.assert_at_rest()


@pytest.fixture
def fuse_directory(tmp_path: Path, held: ExitStack) -> Path:
    """An empty directory on FUSE. Without FUSE the test is skipped; a missing package fails it."""
    if not fuse.can_be_had():
        pytest.skip("there is no /dev/fuse here")
    (tmp_path / "fuse").mkdir()
    try:
        return held.enter_context(fuse.direct_io(tmp_path / "fuse"))
    except CannotBeHad as err:
        if builds.required():
            pytest.fail(f"required here: {err}")
        pytest.skip(str(err))


@pytest.fixture
def make_lab(tmp_path: Path, held: ExitStack) -> Callable[..., Lab]:
    """Make a lab: `make_lab(build, {"vda": 16 * MIB})`; on a `StorageDaemon` if told by `kind_of_machine`."""

    def make(
        build: Build,
        sizes: dict[str, int] | None = None,
        *,
        formats: dict[str, str] | None = None,
        seed: int = 1,
        open_to_user: bool = False,
        kind_of_machine: type[Machine] | None = None,
        **machine_options: Any,
    ) -> Lab:
        sizes = sizes or {"vda": 16 * MIB, "vdb": 8 * MIB + 512}
        disks = []
        for name, size in sizes.items():
            kind = (formats or {}).get(name, "qcow2")
            path = tmp_path / f"{name}.{kind}"
            command = [build.tool("qemu-img"), "create", "-q", "-f", kind, path, str(size)]
            subprocess.run(command, check=True, timeout=30)
            if open_to_user:  # the disk is QEMU's own; nothing else here is
                path.chmod(0o666)
                for parent in (tmp_path, *tmp_path.parents[:3]):
                    parent.chmod(parent.stat().st_mode | 0o011)
            disks.append(Disk(name, path, kind))
        kind_of_machine = kind_of_machine or (SimulatedMachine if build.simulated else Machine)
        machine = kind_of_machine(build, disks, **machine_options)
        held.callback(machine.close)
        writer, agent = make_guest(machine, sizes, seed, held)
        try:
            machine.start()
        except CannotBeHad as err:
            pytest.skip(str(err))
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        cli = make_cli(machine, tmp_path)
        return Lab(machine, agent, writer, cli, tmp_path)

    return make


def make_guest(machine: Machine, sizes: dict[str, int], seed: int, held: ExitStack) -> tuple[Writer, Agent]:
    """Return who writes to a machine's disks and who answers as its agent: the test, or the simulator."""
    if isinstance(machine, SimulatedMachine):
        simulated = SimulatedWriter(machine, sizes, seed)
        held.callback(simulated.stop)
        return simulated, SimulatedAgent(machine)
    writer = Writer(sizes, machine.io, seed)
    held.callback(writer.stop)
    return writer, held.enter_context(PlayedAgent(machine.agent_path, writer.freeze, writer.thaw))


def make_cli(machine: Machine, directory: Path) -> Cli:
    """Return the command line for a machine."""
    scratch = directory / "scratch"
    scratch.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        **machine.build.environment(),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
    }
    environment.pop("BACKUPCTL_CONFIG", None)
    return Cli(
        repository=directory / "repository",
        environment=environment,
        scratch=scratch,
        vm=["--qmp", f"unix:{machine.qmp_path}", "--agent", f"unix:{machine.agent_path}"],
    )


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest) -> Iterator[Libvirtd]:
    """A libvirtd of the module's own. The module's `LIBVIRTD`, if there is one, has its options."""
    pytest.importorskip("libvirt", reason="python3-libvirt is not installed")
    try:
        with Libvirtd(**getattr(request.module, "LIBVIRTD", {})) as made:
            yield made
    except CannotBeHad as err:
        pytest.skip(str(err))
