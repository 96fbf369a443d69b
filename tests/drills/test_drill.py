# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl drill` as a user calls it; and that a drill fails when the product is broken."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from backupctl.drills.catalog import DRILLS

ROOT = Path(__file__).resolve().parents[2]
PLANTED_IN = (
    "backupctl.drills.fork_server",
    "full",
    "incremental",
    "recover",
    "restore",
)
UNMET = {
    "kill-full-transaction": "the guest is thawed",
    "bitmap-removed": "committed points are unchanged",
    "damaged-data": "restore ends with 4, not 0",
}
"""A part of the verdict, where another check might fail instead."""
PLANTED = {
    # What a failed run recorded is thrown away instead of given back.
    "kill-incremental-copy": "from backupctl.vm.qmp import bitmaps\nbitmaps._roll_back = lambda new, base: "
    "[bitmaps._on(one.node, one.name, 'remove') for one in new] "
    "+ ([bitmaps._on(base.node, base.name, 'enable')] if new and base and not base.recording else [])\n",
    # A job is left behind.
    "sigterm": "from backupctl.vm.qmp import teardown\nteardown.teardown = lambda *a, **k: []\n",
    # The guard leaves the guest frozen when its run dies. (It is started without our directory in its path.)
    "kill-full-transaction": "from backupctl.vm.guest import guard\n"
    "guard.PROGRAM = 'import threading; start = threading.Thread.start; threading.Thread.start = "
    'lambda self: self._target.__name__ == "_go_on_thawing" or start(self); \' + guard.PROGRAM\n',
    # A run changes a point that was committed.
    "bitmap-removed": "from backupctl.repository import pending_point\n"
    "commit = pending_point.PendingPoint.commit\n"
    "def spoil(self, manifest):\n    for path in self.path.parent.glob('*Z/*.qcow2'):\n"
    "        path.open('ab').write(bytes(512))\n    return commit(self, manifest)\n"
    "pending_point.PendingPoint.commit = spoil\n",
    # Whatever is read back is believed.
    "damaged-data": "from backupctl.transfer import verify_filter\n"
    "verify_filter.VerifyFilter._compare = lambda *a: None\n",
}


def drill(
    directory: Path, *arguments: str, planted: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Call it; planted: Python that each run of backupctl begins with."""
    body = textwrap.indent(planted or "pass", "    ")
    (directory / "sitecustomize.py").write_text(
        f"import sys\nif {{{', '.join(map(repr, PLANTED_IN))}}} & set(sys.orig_argv):\n{body}"
    )
    return subprocess.run(
        [sys.executable, "-m", "backupctl", "drill", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{directory}", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("place", ["simulator", "qemu"])
def test_some_drills_pass_and_the_document_tells_what_happened(tmp_path, place):
    names = ["kill-incremental-transaction", "sigterm", "nbd-drops", "damaged-data", "bitmap-removed"]
    done = drill(tmp_path, *names, "--json", "--on", place)
    assert done.returncode == 0, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["drills"]}
    assert list(found) == names
    played = [name for name, one in found.items() if one["verdict"] == "passed"]
    assert played == (names if place == "simulator" else [name for name in names if name != "nbd-drops"])
    assert all(found[name]["compared_bytes"] > 40 << 20 for name in played)
    assert found["sigterm"]["exit_code"] == 1
    assert found["sigterm"]["step"] == "copy"
    assert found["kill-incremental-transaction"]["exit_code"] == -9


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_makes_its_drill_fail(tmp_path, name):
    done = drill(tmp_path, name, "--json", planted=PLANTED[name])
    assert done.returncode == 4, done.stdout
    (found,) = json.loads(done.stdout)["drills"]
    assert found["verdict"] == "FAILED"
    assert found["problem"]
    assert UNMET.get(name, "") in found["problem"]


def test_the_table_shows_every_drill_and_its_verdict(tmp_path):
    done = drill(tmp_path, "agent-refuses", "two-runs")
    assert done.returncode == 0, done.stderr
    for word in ("agent-refuses", "two-runs", "75", "passed", "2 passed, 0 failed"):
        assert word in done.stdout


def test_the_drills_are_listed_and_an_unknown_one_is_refused(tmp_path):
    listed = drill(tmp_path, "--list", "--json")
    assert [one["name"] for one in json.loads(listed.stdout)] == [one.name for one in DRILLS]
    assert drill(tmp_path, "no-such-drill").returncode == 2


def test_nothing_is_left_behind(tmp_path):
    (tmp_path / "tmp").mkdir()
    done = drill(tmp_path, "kill-full-copy", "qemu-crashes", TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    left = [path.name for path in (tmp_path / "tmp").iterdir()]
    # A directory for the socket of a run that was killed is swept by a later one.
    assert [name for name in left if not name.startswith("bctl-")] == []
