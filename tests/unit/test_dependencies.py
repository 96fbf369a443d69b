# SPDX-License-Identifier: GPL-2.0-or-later
"""What is used of a library without its promise is there, and held by bounds on its version."""

import inspect
import re
import tomllib
from importlib import metadata

import pytest
from qemu.qmp import QMPClient

from backupctl.vm.qmp import monitor
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("hook", "parameters", "awaited"),
    [
        ("_do_recv", ["self"], True),
        ("_on_message", ["self", "msg"], True),
        ("_cb_outbound", ["self", "msg"], False),
        ("_cb_inbound", ["self", "msg"], False),
    ],
)
def test_the_hooks_of_qemu_qmp_that_the_monitor_overrides_are_there(hook, parameters, awaited):
    for owner in (QMPClient, monitor._Client):
        found = getattr(owner, hook)
        assert inspect.iscoroutinefunction(found) == awaited
        assert list(inspect.signature(found).parameters) == parameters
    assert hook in vars(monitor._Client)


@pytest.mark.parametrize("name", ["qemu.qmp", "click"])
def test_a_library_whose_insides_are_used_is_bounded_on_both_sides(name):
    (bounds,) = (one.removeprefix(name) for one in PROJECT["dependencies"] if one.startswith(name))
    least, end = re.fullmatch(r">=([0-9.]+),<([0-9.]+)", bounds).groups()
    assert numbers(least) <= numbers(metadata.version(name)) < numbers(end)


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"[0-9]+", version)]
