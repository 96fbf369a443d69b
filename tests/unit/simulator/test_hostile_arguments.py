# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever arguments come, a command answers or refuses; it never trips."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backupctl.simulator import arguments
from backupctl.simulator.commands import TABLE
from backupctl.simulator.disks import DiskSpec
from backupctl.simulator.failure import CommandError
from backupctl.simulator.faults import Faults
from backupctl.simulator.machine import Machine, Power, Settings

NAMES = [
    "drive-vda",
    "vda",
    "b0",
    "tmp0",
    "",
    "/machine/peripheral/vda",
    "drive",
    "file",
    "qcow2",
    "/dev/null",
    ".",
    "a\0b",
    "x" * 200,
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 33) | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["node", "name", "type", "data", "path"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FORMLESS = {"blockdev-add": ["driver", "node-name", "file", "backing", "target", "filename", "read-only"]}
FORMLESS["device_add"] = ["driver", "id", "drive"]
QUIET = sorted(set(TABLE) - {"quit"})


def given_for(command):
    form = TABLE[command].form
    names = FORMLESS.get(command, []) if form is None else [name.removesuffix("?") for name in form]
    kinds = dict.fromkeys(names, VALUES)
    for name, kind in (form or {}).items():
        typed = {
            "str": st.sampled_from(NAMES),
            "int": st.integers(-2, 1 << 33),
            "uint32": st.integers(0, 1 << 31),
        }
        typed |= {"bool": st.booleans(), "list": st.lists(VALUES, max_size=2)}
        if isinstance(kind, tuple):
            kinds[name.removesuffix("?")] = st.sampled_from(kind)
        elif kind in typed:
            kinds[name.removesuffix("?")] = typed[kind] | VALUES
    return st.fixed_dictionaries({}, optional=kinds)


@pytest.fixture(scope="module")
def vm(tmp_path_factory):
    disks = (DiskSpec.parse("vda=1M"), DiskSpec.parse("vdb=1M,format=raw"))
    made = Machine(
        Settings(tmp_path_factory.mktemp("vm"), disks),
        Faults(),
        lambda _event: None,
        Power(lambda _how: None),
    )
    yield made
    made.end(clean=True)


@pytest.mark.parametrize("command", QUIET)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_command_answers_or_refuses(vm, command, data):
    chosen, wanted = TABLE[command], data.draw(given_for(command))
    here = os.getcwd()
    os.chdir(vm.settings.directory)  # a command may make a socket
    try:
        if chosen.form is not None:
            arguments.check(chosen.form, wanted)
        chosen.run(vm, wanted)
    except CommandError:
        return  # a refusal is an answer
    finally:
        os.chdir(here)
