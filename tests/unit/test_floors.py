# SPDX-License-Identifier: GPL-2.0-or-later
"""The rooms of the package and the floors that they stand on: an import leads down, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = (
    {"errors"},
    {"names", "cancel", "sizes"},
    {"system", "events"},
    {"finding", "progress", "options", "digests", "images", "filesystems"},
    {"targets", "transfer"},
    {"vm", "repository"},
    {"operations"},
    {"drills", "outcome", "monitoring"},
    {"cli"},
    {"__main__"},
)
"""From the ground up. Rooms of one floor are strangers to each other."""
NAMED_BY_ANYBODY = {"", "errors"}
STRANGERS = {"vm", "transfer", "repository", "targets"}
"""What operations bring together, and nobody else."""
DRIVERS = tuple(f"backupctl.vm.{room}" for room in ("guest", "libvirt", "offline", "qmp", "remote"))
"""What only vm knows: the others speak to a driver (vm/driver.py)."""
JUDGE = "drills"
"""Asks QEMU itself whether the rest did what it says."""
ALONE = "simulator"
"""Imports nothing of the rest; only the command that starts it imports it."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "backupctl").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """The modules of the package that a module names in its imports, those for the type checker too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found & set(MODULES)


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


ARROWS = sorted({(one, other) for one in MODULES for other in imports(one) if room(one) != room(other)})


def test_every_room_has_a_floor():
    rooms = {room(module) for module in MODULES} - {"", ALONE}
    assert rooms <= {name for rooms in FLOORS for name in rooms}


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room(module) not in ("", ALONE)))
def test_an_import_leads_down(module):
    for other in imports(module):
        here, there = room(module), room(other)
        if here == there or there in NAMED_BY_ANYBODY:
            continue
        if there == ALONE:
            assert module == "backupctl.cli.simulate"
            continue
        assert floor(there) < floor(here), f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room(module) in STRANGERS))
def test_strangers_do_not_know_each_other(module):
    for other in imports(module):
        assert room(other) == room(module) or room(other) not in STRANGERS, f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room(module) not in ("vm", JUDGE)))
def test_only_vm_knows_how_a_vm_is_spoken_to(module):
    assert [other for other in imports(module) if other.startswith(DRIVERS)] == []


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room(module) == ALONE))
def test_the_simulator_stands_alone(module):
    assert {room(other) for other in imports(module)} <= {ALONE}


def test_there_is_no_circle():
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    graph = {one: imports(one) - packages for one in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_this_test_sees_imports():
    assert "backupctl.errors" in imports("backupctl.names")
    assert len(ARROWS) > 300
