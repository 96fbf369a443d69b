# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/protocol.md shows the QMP that is really sent."""

import json
import re

import pytest

from fixtures.proxy import Proxy
from tests.conftest import ROOT

pytestmark = pytest.mark.simulator_too


def commands(text: str) -> list[dict]:
    """Read JSON objects that follow one another."""
    found, rest = [], text.strip()
    while rest:
        command, end = json.JSONDecoder().raw_decode(rest)
        found.append(command)
        rest = rest[end:].strip()
    return found


def shown() -> list[dict]:
    text = (ROOT / "docs/protocol.md").read_text()
    return [
        command for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) for command in commands(block)
    ]


def test_the_page_shows_the_commands_of_an_incremental_in_their_order(build, make_lab):
    lab = make_lab(build, {"vda": 16 << 20})
    lab.writer.write(10)
    first = lab.backup("full")["point"]
    lab.writer.write(5)
    sent: list[bytes] = []
    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path, lambda content: sent.append(content) or ""):
        lab.cli.vm[1] = f"unix:{path}"
        second = lab.backup("incremental")["point"]
    text = b"".join(sent).decode().replace(first, "P0").replace(second, "P1")
    tag = re.search(r"backupctl-([0-9a-f]{8})-", text)[1]
    real = commands(text.replace(tag, "a1b2c3d4"))
    wanted = shown()
    names = {command["execute"] for command in wanted}
    real = [command for command in real if command["execute"] in names]
    begun = next(n for n, command in enumerate(real) if command["execute"] == "add-fd")
    really_sent = []
    for command in real[begun:]:
        del command["id"]
        if command["execute"] == "remove-fd":
            command["arguments"]["fdset-id"] = 0
        if command["execute"] == "blockdev-add":
            command["arguments"]["file"]["filename"] = "/dev/fdset/0"
        really_sent.append(command)
    # closefd is sent again by the last step, which looks whether anything is left.
    assert [c for c in really_sent if c["execute"] != "closefd"] == [
        c for c in wanted if c["execute"] != "closefd"
    ]
