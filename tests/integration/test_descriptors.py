# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's tools are given descriptors: on no command line of theirs is the name of an image."""

import json
import re
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Lab

MIB = 1 << 20
DESCRIPTOR = re.compile(r"/proc/self/fd/\d+|/dev/fdset/\d+")
WRITTEN_DOWN = ("-b", "--pidfile", "--nbd-server")
"""Options whose value may hold a name: a backing link, which is not opened, and what is not an image."""
RECORDER = """#!/bin/sh
for each in {name} "$@"; do printf '%s\\0' "$each"; done >> {log}
printf '\\n' >> {log}
exec {real} "$@"
"""


def recorded(lab: Lab, directory: Path) -> Path:
    """Have the command line's tools write their arguments down first; returns where."""
    log = directory / "arguments"
    directory.mkdir()
    for variable, name in (("QEMU_IMG", "qemu-img"), ("QEMU_STORAGE_DAEMON", "qemu-storage-daemon")):
        real = lab.cli.environment.get(variable) or shutil.which(name)
        program = directory / name
        program.write_text(RECORDER.format(name=name, log=log, real=real))
        program.chmod(0o755)
        lab.cli.environment[variable] = str(program)
    return log


def calls(log: Path) -> list[list[str]]:
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


def filenames(options: Any) -> list[str]:
    """Return all names of files in QEMU's options, however deep."""
    if isinstance(options, dict):
        own = [str(value) for key, value in options.items() if key == "filename"]
        return own + [name for value in options.values() for name in filenames(value)]
    return []


def named(call: list[str]) -> list[str]:
    """Return what a command line names to be opened."""
    found = []
    for before, argument in pairwise(call):
        if before in WRITTEN_DOWN:
            continue
        text = argument.removeprefix("json:")
        if text.startswith("{"):
            found += filenames(json.loads(text))
        elif "/" in text or ".qcow2" in text or ".raw" in text:
            found.append(text)
    return found


def serve(lab: Lab, point: str, *options: str) -> None:
    """Serve a point until it is said where, and end that."""
    command = lab.cli.command("serve", "web", point, "--json", *options, vm=False)
    serving = subprocess.Popen(command, env=lab.cli.environment, stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    with serving.stdout:
        assert any(line == "}\n" for line in iter(serving.stdout.readline, ""))
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(30) == 0


@pytest.mark.simulator_too
def test_no_tool_of_qemu_is_given_the_name_of_an_image(any_build, make_lab, tmp_path):
    """Through a full, incrementals, all ways out, a verify, a diff, a merge in place and into a new image."""
    lab = make_lab(any_build, {"vda": 4 * MIB, "vdb": MIB}, formats={"vdb": "raw"})
    log = recorded(lab, tmp_path / "tools")
    lab.writer.write(5)
    points = [lab.backup("full")["point"]]
    for _ in range(3):
        lab.writer.write(5)
        points.append(lab.backup("incremental")["point"])
    cli, out = lab.cli, tmp_path / "out"
    cli.run("verify", "web", vm=False)
    cli.run("diff", "web", points[0], points[1], vm=False)
    for extra in ([], ["--format", "raw"], ["--force"], ["--thin", "--force"]):
        cli.run("restore", "web", "latest", "--to", f"{out}/", *extra, vm=False)
    before = len(calls(log))
    for extra in ([], ["--disk", "vda", "--writable-overlay", str(out / "overlay.qcow2")]):
        serve(lab, points[1], *extra)
    assert len(calls(log)) > before
    # A hard link keeps the merge from being made in place.
    (out / "copy.qcow2").hardlink_to(cli.repository / "web" / points[1] / "vda.qcow2")
    cli.run("prune", "web", "--keep-last", "1", vm=False)
    every = [(call[0], name) for call in calls(log) for name in named(call)]
    assert len(every) > 12
    assert [found for found in every if not DESCRIPTOR.fullmatch(found[1])] == []
    assert {call[1] for call in calls(log) if call[0] == "qemu-img"} >= {"create"}
    lab.assert_point(points[-1], lab.writer.model)


def test_what_is_looked_for_would_be_found(tmp_path):
    assert named(["qemu-img", "create", "-b", "../x.qcow2", "a.qcow2"]) == ["a.qcow2"]
    options = {"file": {"filename": "/a"}, "backing": {"file": {"filename": "b"}}}
    assert named(["qemu-img", "check", "json:" + json.dumps(options)]) == ["/a", "b"]
    log = tmp_path / "log"
    program = tmp_path / "program"
    program.write_text(RECORDER.format(name="x", log=log, real="true"))
    program.chmod(0o755)
    subprocess.run([program, "a b", "{}"], check=True, timeout=10)
    assert calls(log) == [["x", "a b", "{}"]]
