# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt a run anywhere, and the recovery after it anywhere, on the simulator.

A failing case prints the command that repeats it. In `make test` every so many-th case is played; all of them
are `make explore`.
"""

import os
import random
from collections.abc import Sequence

import pytest

from fixtures import builds
from tests.exploration.explorer import ENDS, SHAPES, WHEN, Cut, Explorer

MIB = 1 << 20
CHUNKS = 8
MOST_STEPS = 60  # no recovery has so many
DURABLE = ("sync_file ", "sync_folder ", "make_folder ", "write_new ", "replace ", "rename ")
MET = {"term": "", "hangup": "execute ", "lost": "execute ", "eio": DURABLE, "enospc": DURABLE}
"""What does not kill a run: with what the steps begin at which it can be met."""
SINGLES, OTHERS, AGAIN = 3, 1, ("", "", *ENDS)  # in the quick tier


@pytest.fixture
def explorer(make_lab):
    """Give `explorer(shape)`."""

    def make(shape: str) -> Explorer:
        sizes = {"vda": 2 * MIB} if shape != "two disks" else {"vda": 2 * MIB, "vdb": MIB + 512}
        lab = make_lab(builds.simulator("10.0"), sizes)
        return Explorer(lab, shape)

    return make


def play(explorer: Explorer, first: Cut, again: Cut | None = None) -> bool:
    try:
        return explorer.play(first, again)
    except BaseException as err:  # a time-out too
        case = " ".join(map(str, filter(None, (first, again))))
        err.add_note(f"repeat it: EXPLORE='{explorer.shape} {case}' pytest tests/exploration -k repeat")
        raise


def cuts(steps: list[str], deed: str = "") -> list[Cut]:
    if deed in MET:
        numbers = [number for number, step in enumerate(steps) if step.startswith(MET[deed])]
        return [Cut(number, "before", deed) for number in numbers]
    return [Cut(number, when, deed) for number in range(len(steps)) for when in WHEN]


def around_the_commit(steps: list[str]) -> list[Cut]:
    rename = max(number for number, step in enumerate(steps) if step == "rename ")
    return [Cut(rename, when) for when in WHEN]


def pairs(explorer: Explorer, first: Cut, deed: str = "", whens: Sequence[str] = WHEN) -> int:
    """Play a cut of the run with every cut of the recovery; returns how many there were."""
    played = 0
    for step in range(MOST_STEPS):
        for when in whens:
            if not play(explorer, first, Cut(step, when, deed)):
                return played
            played += 1
    raise AssertionError(f"a recovery had more than {MOST_STEPS} steps")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_of_all_interruptions(explorer, shape, record_property):
    """The same sample each time: what the whole exploration finds it may not."""
    one = explorer(shape)
    steps, rng = one.steps(), random.Random(shape)
    for cut in [*around_the_commit(steps), *rng.sample(cuts(steps), SINGLES)]:
        play(one, cut)
    for cut, deed in zip(rng.sample(cuts(steps), len(AGAIN)), AGAIN, strict=True):
        assert play(one, cut, Cut(rng.randrange(8), rng.choice(WHEN), deed)), "a recovery has more steps"
    for deed in (*ENDS, *MET):
        for cut in rng.sample(cuts(steps, deed), OTHERS):
            play(one, cut)
    record_property("cases", (f"interruptions, a sample: {shape}", one.cases))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("deed", ["", *ENDS, *MET])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_interruption(explorer, shape, deed, chunk, record_property):
    one = explorer(shape)
    for cut in cuts(one.steps(), deed)[chunk::CHUNKS]:
        play(one, cut)
    record_property("cases", (f"interruptions: {shape}, {deed or 'SIGKILL'}", one.cases))
    assert one.cases


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("again", WHEN)
@pytest.mark.parametrize("first", WHEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pair(explorer, shape, first, again, chunk, record_property):
    """`-k before-before` is a quarter of them: all states that two deaths between steps can leave."""
    one = explorer(shape)
    firsts = [cut for cut in cuts(one.steps()) if cut.when == first][chunk::CHUNKS]
    played = sum(pairs(one, cut, whens=[again]) for cut in firsts)
    record_property("cases", (f"pairs of interruptions, {first} and {again} a step: {shape}", played))
    assert played


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("deed", ENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_of_qemu_at_every_step_of_a_recovery(explorer, shape, deed, record_property):
    """After deaths here and there, the commit's among them."""
    one = explorer(shape)
    steps = one.steps()
    firsts = [*around_the_commit(steps), *random.Random(deed).sample(cuts(steps), SINGLES)]
    played = sum(pairs(one, first, deed) for first in firsts)
    record_property("cases", (f"QEMU ends ({deed}) in a recovery: {shape}", played))
    assert played


@pytest.mark.skipif(
    "EXPLORE" not in os.environ, reason="EXPLORE='incremental 17:before 5:after' names a case"
)
def test_repeat_one(explorer):
    *shape, first = os.environ["EXPLORE"].split(" ")
    again = None
    if ":" in shape[-1]:
        again, first = Cut.parse(first), shape.pop()
    one = explorer(" ".join(shape))
    one.steps()
    play(one, Cut.parse(first), again)
