# SPDX-License-Identifier: GPL-2.0-or-later
"""One word, one meaning: names that were replaced by the field's own terms do not come back."""

import ast
from collections.abc import Iterator

import pytest

from tests.unit.test_floors import MODULES, room

REPLACED = {
    # the virtual machine
    "Cut": "DiskSnapshot",
    "DEAF_TO": "IGNORED_SIGNALS",
    "Freezer": "FreezeControl",
    "Guard": "GuardClient or GuardServer",
    "Holder": "HeldSockets",
    "NOBODY": "NO_CLIENTS",
    "Owner": "Namespace",
    "Room": "ScratchBudget",
    "Settlement": "BitmapPlan",
    "Shared": "SharedFilesystem",
    "dismantle": "teardown",
    "ease": "relax",
    "expose": "export_nodes",
    "guard_by": "register_guard",
    "left_out": "skipped",
    "lift": "disable",
    "settle": "recover_vm, or what is resolved",
    "settlement": "BitmapPlan",
    "stand_in": "take_over",
    "unite": "merge_actions",
    "withdraw_filters": "remove_filters",
    # digests, images, transfer, targets
    "Logical": "EffectiveContent",
    "Marks": "ClusterMap",
    "Prover": "VerifyFilter",
    "Recorder": "DedupFilter",
    "bell": "Wakeup",
    "data_where_they_differ": "mark_differences",
    "keep_vanished": "drop_unneeded_zeroes",
    "marks": "cluster_map",
    "rests": "is_idle",
    "sieve": "filter_chunk",
    "sift": "filter",
    "spoilt": "on_mismatch",
    "turn": "poll_once",
    "unproven": "unverified",
    # the repository and the operations on it
    "Depth": "VerifyScope",
    "Flaw": "Problem",
    "Held": "RetentionCandidate",
    "Pour": "Pipeline",
    "Proof": "LayerCheck",
    "Reach": "impact",
    "Readout": "DiskReader",
    "Taker": "LayerCopier",
    "Touched": "Affected",
    "at_rest": "clean",
    "chance": "rng",
    "forsake": "abandon",
    "proof": "layer_check",
    "reach": "impact",
    "take_back": "uncommit",
    "why_unusable": "chain_error",
    # the command line
    "Live": "ProgressReporter",
    "Quiet": "WarningReporter",
    "Stop": "Cancellation",
    "Wishes": "SimulatorOptions",
    # drills and the simulator
    "Call": "CallSpec",
    "Door": "ListeningSocket",
    "Ground": "Site",
    "Program": "CallSpec",
    "Said": "Result",
    "Teller": "EventSink",
    "Unmet": "ExpectationFailed",
    "aftermath": "next_run_notes",
    "doom": "kill_at_step",
    "doomed": "faulty",
    "door": "listener",
    "ends": "terminations",
    "ground": "site",
    "hurry": "short_timeouts",
    "trip": "crash_like_qemu",
    "warm": "fork_server",
    "wishes": "options",
}
"""A name that was given up, and the one in its place. Names are compared without leading underscores."""
REPLACED_IN = {
    "simulator": {"deed": "action", "deeds": "actions", "tell": "emit_event"},
    "vm": {"Shown": "ExportSpec", "cut": "snapshot", "owner": "namespace", "shown": "export_spec"},
    "drills": {"said": "result", "tell": "send", "told": "received", "words": "stderr"},
}
"""The same for words which have another meaning elsewhere, by room."""
RENAMED_MODULES = {
    "grounds": "sites",
    "haggle": "option_haggling",
    "inplace": "in_place",
    "landing": "output",
    "layout": "repository",
    "needs": "requirements",
    "picture": "block_map",
    "plain": "safe_open",
    "showing": "public_server",
    "strict": "strict_json",
}
"""The same for the names of modules only."""


def names(text: str) -> Iterator[tuple[int, str]]:
    """Yield the names that a text defines, with their lines: classes, functions, arguments, variables, …"""
    for node in ast.walk(ast.parse(text)):
        match node:
            case (
                ast.ClassDef(name=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.arg(arg=name)
                | ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
                | ast.alias(asname=str(name))
            ):
                yield node.lineno, name


def faults(module: str, text: str) -> list[str]:
    replaced = REPLACED | REPLACED_IN.get(room(module), {})
    found = [
        f"{module}, line {line}: {name} is now {replaced[word]}"
        for line, name in names(text)
        if (word := name.lstrip("_")) in replaced
    ]
    own = module.rpartition(".")[2]
    better = (replaced | RENAMED_MODULES).get(own)
    return [f"{module} is now {better}", *found] if better else found


@pytest.mark.parametrize("module", MODULES)
def test_no_name_that_was_given_up_is_used(module):
    assert faults(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "class Ground: pass",
        "def _hurry(): pass",
        "async def hurry(): pass",
        "def f(*, doomed): pass",
        "for warm in (): pass",
        "self._warm: int = 1",
        "(_, warm), *_ = x",
        "with x as warm: pass",
        "import x as warm",
        "(warm := 1)",
    ],
)
def test_this_test_sees_it_wherever_it_is_defined(text):
    assert len(faults("backupctl.cli.x", text)) == 1


def test_this_test_sees_the_name_of_a_module():
    assert faults("backupctl.targets.landing", "")
    assert not faults("backupctl.cli.x", "landing = 1")


def test_a_word_of_one_room_is_free_in_others():
    assert faults("backupctl.drills.x", "said = 1")
    assert not faults("backupctl.cli.x", "said = 1")
