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
    "Shown": "ExportSpec",
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
    "borne": "tolerate_errors",
    "data_where_they_differ": "mark_differences",
    "inplace": "in_place",
    "keep_vanished": "drop_unneeded_zeroes",
    "landing": "output",
    "marks": "cluster_map",
    "plain": "safe_open",
    "rests": "is_idle",
    "showing": "public_server",
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
    "layout": "repository",
    "proof": "layer_check",
    "reach": "impact",
    "strict": "strict_json",
    "take_back": "uncommit",
    "why_unusable": "chain_error",
    # the command line
    "Live": "ProgressReporter",
    "Quiet": "WarningReporter",
    "Stop": "Cancellation",
    "Wishes": "SimulatorOptions",
    "needs": "requirements",
    "picture": "block_map",
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
    "grounds": "sites",
    "haggle": "option_haggling",
    "hurry": "short_timeouts",
    "trip": "crash_like_qemu",
    "warm": "fork_server",
    "wishes": "options",
}
"""A name that was given up, and the one in its place. Names are compared without leading underscores."""
REPLACED_IN = {
    "simulator": {"deed": "action", "deeds": "actions", "tell": "emit_event"},
    "vm": {"cut": "snapshot", "owner": "namespace", "shown": "export_spec"},
    "drills": {"said": "result", "tell": "send", "told": "received", "words": "stderr"},
}
"""The same for words which have another meaning elsewhere, by room."""


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
    found = [(0, module.rpartition(".")[2]), *names(text)]
    return [
        f"{module}, line {line}: {name} is now {replaced[word]}"
        for line, name in found
        if (word := name.lstrip("_")) in replaced
    ]


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


def test_a_word_of_one_room_is_free_in_others():
    assert faults("backupctl.drills.x", "said = 1")
    assert not faults("backupctl.cli.x", "said = 1")
