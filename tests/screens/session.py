# SPDX-License-Identifier: GPL-2.0-or-later
"""A first session with backupctl, as somebody new to it would type it: two VMs, from the package to the page.

The VMs are simulated. Their guests write only when the session says so, so that every size is the same each
time; the disk of one holds an ext4 with files. `same_each_time` replaces what differs from one run to the
next: times, ids, places.
"""

import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from backupctl import __version__
from fixtures.machine import line_socket
from tests.screens.pseudo_terminal import Terminal
from tests.unit.filesystems.sources import make_ext, run

MIB = 1 << 20
SHOWN = "/backups/machine"
_PATIENCE_SECONDS = 60.0
_POINT = re.compile(r"\b20\d{6}T\d{6}Z")
_BAR = "━" * 24
_REPLACED = (
    # A line of progress is there if ten seconds are over.
    (r"^backupctl: \w+: (vda: )?\d+ % of [^\n]*\n", ""),
    (rf"{_BAR}[^\n]*", f"{_BAR} (size, rate, time left)"),
    (r"\b20\d\d-\d\d-\d\d \d\d:\d\d(:\d\d)?", lambda found: f"2026-01-10 12:00{':00' * bool(found[1])}"),
    (r"\b20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", "2026-01-10T12:00:00"),
    (r"\d+ min \d+ s\b|\d+\.\d s\b", "0.5 s"),
    (r" {2,}(TIME|0\.5 s)$", r"  \1"),
    # Of two points within a second the later one is named by the next second.
    (r"(\d+ (s|min) ago|in the future)(?= {2})", "1 s ago"),
    (r"(AGE|1 s ago) {2,}(?=\w)", lambda found: f"{found[1]:<7}  "),
    (r"\d+ (s|min) ago", "1 s ago"),
    (r"frozen \d+ ms", "frozen 5 ms"),
    (r"\s+[\d,.]+\s+[GMT]iB\s+free", " 70.0 GiB free"),
    (r"checked\s+in\s+[^:]*:\s+no\s+damage", "checked in 0.5 s, 100.0 MiB/s: no damage"),
    (r"backupctl-error-\w+", "backupctl-error-01234567"),
    (r"backupctl-[0-9a-f]{8}-", "backupctl-01234567-"),
    (r"_age'=\d+s", "_age'=1s"),
    (r"(?<=2 VMs, )\d+\.\d KiB", "20.0 KiB"),
    (r"^Now\n.*?(?=^Time line of)", ""),  # the labels of an axis of times
    (r"qemu\.json +\d+ B", "qemu.json  900 B"),
    (r"took \d+\.?\d* s", "took 1 s"),
    (r"\| \d+ s \| (\d+ ms|-) \|", "| 1 s | 5 ms |"),
    (re.escape(__version__), "VERSION"),
)


class Session:
    """Commands on one terminal in one directory."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm-256color",
            "TZ": "UTC",
            "TMPDIR": str(directory),
            "STATE_DIRECTORY": str(directory / "state"),
        }
        # Wide enough for every table, however long ago something was: a column that has no room is left out.
        self._terminal = Terminal(directory, self.environment, columns=100)

    def types(self, *commands: str, kill_at: str = "") -> str:
        """Run commands; return their screens. kill_at: see `Terminal.types`."""
        return "\n".join(self._terminal.types(command, kill_at=kill_at) for command in commands)

    def asks(self, *arguments: str) -> Any:
        """Return the document of a command."""
        done = subprocess.run(
            ["backupctl", *arguments, "--json"],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            timeout=_PATIENCE_SECONDS,
            check=True,
        )
        return json.loads(done.stdout)


class Vm:
    """A simulated VM."""

    def __init__(self, session: Session, name: str, size: str, seed: int) -> None:
        self.name = name
        self._session = session
        self._size = size
        self._seed = seed
        self._held = ExitStack()

    def starts(self) -> None:
        """Start it, and wait until it answers."""
        place, name = self._session.directory, self.name
        command = ["backupctl", "simulate", "--disk", f"vda={self._size}", "--seed", str(self._seed)]
        command += ["--qmp", f"{name}.qmp", "--agent", f"{name}.agent", "--control", f"{name}.control"]
        process = subprocess.Popen(
            ["/usr/bin/env", *command, "--state", place / f"{name}.disks"],
            cwd=place,
            env=self._session.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._held.callback(process.wait, _PATIENCE_SECONDS)
        self._held.callback(process.terminate)
        assert process.stdout is not None
        self._held.enter_context(process.stdout)
        assert process.stdout.readline() == "ready\n"

    def ends(self) -> None:
        """Shut it down: its sockets are gone, and its bitmaps are stored."""
        self._held.close()

    def writes(self) -> None:
        """Let the guest write, by its seed."""
        self.tell(do="step", count=50)

    def gets(self, content: bytes) -> None:
        """Write a disk from its beginning, but for the zeroes."""
        for offset in range(0, len(content), MIB):
            piece = content[offset : offset + MIB]
            if piece.count(0) != len(piece):
                self.tell(do="write", disk="vda", offset=offset, data=base64.b64encode(piece).decode())

    def tell(self, **request: Any) -> None:
        """Ask for something on its control socket."""
        with line_socket(self._session.directory / f"{self.name}.control", _PATIENCE_SECONDS) as control:
            control.write(json.dumps(request) + "\n")
            control.flush()
            answer = json.loads(control.readline())
        assert "error" not in answer, answer


@contextmanager
def vms(session: Session) -> Iterator[tuple[Vm, Vm]]:
    """Start two VMs; one has a file system."""
    with ExitStack() as held:
        made = (Vm(session, "web", "64M", 1), Vm(session, "database", "32M", 2))
        for vm in made:
            held.callback(vm.ends)
            vm.starts()
        made[0].gets(file_system(session.directory))
        yield made


def file_system(directory: Path) -> bytes:
    """Make an ext4 with a few files; it takes as much space each time."""
    content, image = directory / "content", directory / "image"
    (content / "etc").mkdir(parents=True)
    (content / "etc/hostname").write_text("web\n")
    (content / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    (content / "srv/www").mkdir(parents=True)
    (content / "srv/www/index.html").write_text("<h1>It works</h1>\n" * 5000)
    run("chmod", "-R", "u=rwX,go=rX", str(content))
    # Newer releases of e2fsprogs write another cluster, unless they are told to make what older ones made.
    plain = "^orphan_file,^metadata_csum_seed"
    made = make_ext(image, "-t", "ext4", "-O", plain, content=content, size="64M")
    run("rm", "-r", str(content), str(image))
    return made


CONFIGURATION = """\
[defaults]
repository = "{0}/repository"
scratch = "{0}"
keep_last = 2
verify_percent = 100
[vm.web]
qmp = "unix:{0}/web.qmp"
agent = "unix:{0}/web.agent"
[vm.database]
qmp = "unix:{0}/database.qmp"
"""


def play(session: Session) -> dict[str, str]:
    """Play the session; return each screen by its name."""
    types = session.types
    seen = {"1-installed": types("backupctl --version", "backupctl list", "backupctl doctor web")}
    with vms(session) as (web, database):
        configure(session)
        seen["2-doctor"] = types("backupctl config check", "backupctl doctor --all")
        seen["3-first-run"] = types("backupctl run --all", "backupctl full web", "backupctl run --all")
        web.writes()
        database.writes()
        next_second()
        seen["4-second-run"] = types("backupctl run --all", "backupctl list")
        database.writes()
        next_second()
        # So slow that the copy takes minutes.
        seen["5-killed"] = types("backupctl incremental database --limit 20k", kill_at="· copy")
        wait_for_guard(session)
        seen["6-recover"] = types(
            "backupctl status database", "backupctl recover database", "backupctl status database"
        )
        database.ends()
        next_second()
        seen["7-off"] = types("backupctl run --all", "backupctl status database", "backupctl doctor database")
        database.starts()
        next_second()
        seen["8-on-again"] = types(
            "backupctl run --all", "backupctl list database", "backupctl show database latest"
        )
    seen["9-restored"] = types(
        "backupctl files web",
        "backupctl files web /etc",
        "backupctl files web /etc/hostname --to restored",
        "cat restored/hostname",
        "backupctl restore web --to restored",
        "backupctl restore web --to restored",
        "backupctl verify",
        "backupctl check --all",
        "backupctl report --html report.html",
    )
    page = (session.directory / "report.html").read_text()
    return same_each_time({**seen, "page": text_of(page)}, session.directory)


def configure(session: Session) -> None:
    """Write the configuration."""
    path = session.directory / "backupctl.toml"
    path.write_text(CONFIGURATION.format(session.directory))
    path.chmod(0o600)
    session.environment["BACKUPCTL_CONFIG"] = str(path)


def next_second() -> None:
    """Wait until the id of the next point cannot be that of the last one."""
    time.sleep(1.1)


def wait_for_guard(session: Session) -> None:
    """Wait until the guard of a killed run has done its part: nothing changes any more."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    found = [session.asks("status", "database")]
    while len(found) < 2 or found[-1]["running"] or found[-1] != found[-2]:
        assert time.monotonic() < deadline
        time.sleep(1)
        found.append(session.asks("status", "database"))


def same_each_time(screens: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Replace what differs from one run to the next. Points keep their order."""
    points = sorted({point for text in screens.values() for point in _POINT.findall(text)})
    names = {point: f"20260110T12{number:02}00Z" for number, point in enumerate(points)}
    return {name: _replaced(text, directory, names) for name, text in screens.items()}


def _replaced(text: str, directory: Path, points: Mapping[str, str]) -> str:
    text = text.replace(str(directory), SHOWN)
    text = _POINT.sub(lambda found: points[found[0]], text)
    for pattern, instead in _REPLACED:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE | re.DOTALL)
    return text


def text_of(page: str) -> str:
    """Return what can be read on a page, a line for each piece of text."""
    reader = _Reader()
    reader.feed(page)
    return "\n".join(reader.lines) + "\n"


_HIDDEN = ("style", "script", "svg")


class _Reader(HTMLParser):
    """Collects the text between tags; the cells of a row in one line. Rows and cells have no end tags."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._hidden = 0
        self._row: list[str] | None = None

    def handle_starttag(self, tag: str, _attributes: object) -> None:
        self._hidden += tag in _HIDDEN
        if tag == "tr":
            self._end_row()
            self._row = []
        elif tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN
        if tag == "table":
            self._end_row()

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if not text or self._hidden:
            return
        if self._row:
            self._row[-1] = f"{self._row[-1]} {text}".strip()
        else:
            self.lines.append(text)

    def _end_row(self) -> None:
        if self._row is not None:
            self.lines.append(" | ".join(self._row))
            self._row = None
