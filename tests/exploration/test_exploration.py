# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt a run at every step, and the recovery after it at every step, on the simulator.

A failing case prints the command that repeats it. `make test` runs a sample of the cases, `make explore` all.
"""

import os
import random
from collections.abc import Sequence

import pytest

from fixtures import builds
from tests.exploration.explorer import SHAPES, TERMINATIONS, WHEN, Explorer, Interruption

MIB = 1 << 20
CHUNKS = 8
MOST_STEPS = 60  # more than any recovery has
DURABLE = ("sync_file ", "sync_directory ", "make_directory ", "write_new ", "append ", "replace ", "rename ")
MET = {"term": "", "hangup": "execute ", "lost": "execute ", "eio": DURABLE, "enospc": DURABLE}
"""Interruptions that do not kill a run, each with the beginnings of the steps at which it can happen."""
SINGLES, OTHERS, AGAIN = 3, 1, ("", "", *TERMINATIONS)  # in the quick tier


@pytest.fixture
def explorer(make_lab):
    """Give `explorer(shape)`."""

    def make(shape: str) -> Explorer:
        sizes = {"vda": 2 * MIB} if shape != "two disks" else {"vda": 2 * MIB, "vdb": MIB + 512}
        lab = make_lab(builds.simulator("10.0"), sizes)
        return Explorer(lab, shape)

    return make


def play(explorer: Explorer, first: Interruption, again: Interruption | None = None) -> bool:
    try:
        return explorer.play(first, again)
    except BaseException as err:  # a time-out too
        case = " ".join(map(str, filter(None, (first, again))))
        err.add_note(f"repeat it: EXPLORE='{explorer.shape} {case}' pytest tests/exploration -k repeat")
        raise


def interruptions(steps: list[str], action: str = "") -> list[Interruption]:
    if action in MET:
        numbers = [number for number, step in enumerate(steps) if step.startswith(MET[action])]
        return [Interruption(number, "before", action) for number in numbers]
    return [Interruption(number, when, action) for number in range(len(steps)) for when in WHEN]


def around_the_commit(steps: list[str]) -> list[Interruption]:
    rename = max(number for number, step in enumerate(steps) if step == "rename ")
    return [Interruption(rename, when) for when in WHEN]


def pairs(explorer: Explorer, first: Interruption, action: str = "", whens: Sequence[str] = WHEN) -> int:
    """Run an interruption of the run with every one of the recovery; return how many there were."""
    played = 0
    for step in range(MOST_STEPS):
        for when in whens:
            if not play(explorer, first, Interruption(step, when, action)):
                return played
            played += 1
    raise AssertionError(f"a recovery had more than {MOST_STEPS} steps")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_of_all_interruptions(explorer, shape, record_property):
    """The sample is always the same; it may miss what the whole exploration finds."""
    one = explorer(shape)
    steps, rng = one.steps(), random.Random(shape)
    for interruption in [*around_the_commit(steps), *rng.sample(interruptions(steps), SINGLES)]:
        play(one, interruption)
    for interruption, action in zip(rng.sample(interruptions(steps), len(AGAIN)), AGAIN, strict=True):
        assert play(one, interruption, Interruption(rng.randrange(8), rng.choice(WHEN), action)), (
            "a recovery has more steps"
        )
    for action in (*TERMINATIONS, *MET):
        for interruption in rng.sample(interruptions(steps, action), OTHERS):
            play(one, interruption)
    record_property("cases", (f"interruptions, a sample: {shape}", one.cases))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("action", ["", *TERMINATIONS, *MET])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_interruption(explorer, shape, action, chunk, record_property):
    one = explorer(shape)
    for interruption in interruptions(one.steps(), action)[chunk::CHUNKS]:
        play(one, interruption)
    record_property("cases", (f"interruptions: {shape}, {action or 'SIGKILL'}", one.cases))
    assert one.cases


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("again", WHEN)
@pytest.mark.parametrize("first", WHEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pair(explorer, shape, first, again, chunk, record_property):
    """`-k before-before` is a quarter of them: all states that two kills between steps can leave."""
    one = explorer(shape)
    firsts = [interruption for interruption in interruptions(one.steps()) if interruption.when == first][
        chunk::CHUNKS
    ]
    played = sum(pairs(one, interruption, whens=[again]) for interruption in firsts)
    record_property("cases", (f"pairs of interruptions, {first} and {again} a step: {shape}", played))
    assert played


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("action", TERMINATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_of_qemu_at_every_step_of_a_recovery(explorer, shape, action, record_property):
    """After kills at some steps, among them the commit."""
    one = explorer(shape)
    steps = one.steps()
    firsts = [*around_the_commit(steps), *random.Random(action).sample(interruptions(steps), SINGLES)]
    played = sum(pairs(one, first, action) for first in firsts)
    record_property("cases", (f"QEMU ends ({action}) in a recovery: {shape}", played))
    assert played


@pytest.mark.skipif(
    "EXPLORE" not in os.environ, reason="EXPLORE='incremental 17:before 5:after' names a case"
)
def test_repeat_one(explorer):
    *shape, first = os.environ["EXPLORE"].split(" ")
    again = None
    if ":" in shape[-1]:
        again, first = Interruption.parse(first), shape.pop()
    one = explorer(" ".join(shape))
    one.steps()
    play(one, Interruption.parse(first), again)
