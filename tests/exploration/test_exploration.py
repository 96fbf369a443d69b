# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupt a run anywhere, and the recovery after it anywhere, on the simulator.

A failing case prints the command that repeats it. In `make test` every so many-th case is played; all of them
are `make explore`.
"""

import os
import random
from contextlib import ExitStack

import pytest

from fixtures import builds
from tests.exploration.explorer import SHAPES, WHEN, Cut, Explorer, zygote

MIB = 1 << 20
CHUNKS = 8
MOST_STEPS = 60  # no recovery has so many
DEEDS = ("quit", "crash", "restart")
SINGLES, PAIRS, ENDS = 7, 3, 2  # of each chunk, in the quick tier


@pytest.fixture
def explorer(make_lab, held: ExitStack):
    """Give `explorer(shape)`."""

    def make(shape: str) -> Explorer:
        sizes = {"vda": 2 * MIB} if shape != "two disks" else {"vda": 2 * MIB, "vdb": MIB + 512}
        lab = make_lab(builds.simulator("10.0"), sizes)
        return Explorer(lab, shape, held.enter_context(zygote(lab.cli.environment)))

    return make


def play(explorer: Explorer, first: Cut, again: Cut | None = None) -> bool:
    try:
        return explorer.play(first, again)
    except AssertionError as err:
        case = " ".join(map(str, filter(None, (first, again))))
        raise AssertionError(
            f"{err}\nrepeat it: EXPLORE='{explorer.shape} {case}' pytest tests/exploration -k repeat"
        ) from err


def cuts(steps: list[str], deed: str = "") -> list[Cut]:
    return [Cut(number, when, deed) for number in range(len(steps)) for when in WHEN]


def pairs(explorer: Explorer, first: Cut) -> int:
    """Play a cut of the run with every cut of the recovery; returns how many there were."""
    played = 0
    for step in range(MOST_STEPS):
        for when in WHEN:
            if not play(explorer, first, Cut(step, when)):
                return played
            played += 1
    raise AssertionError(f"a recovery had more than {MOST_STEPS} steps")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_of_all_interruptions(explorer, shape, record_property):
    """The same sample each time: what the whole exploration finds it may not."""
    one = explorer(shape)
    steps, rng = one.steps(), random.Random(shape)
    for cut in rng.sample(cuts(steps), SINGLES):
        play(one, cut)
    for cut in rng.sample(cuts(steps), PAIRS):
        play(one, cut, Cut(rng.randrange(8), rng.choice(WHEN)))
    for deed in DEEDS:
        for cut in rng.sample(cuts(steps, deed), ENDS):
            play(one, cut)
    record_property("cases", (f"interruptions, a sample: {shape}", one.cases))
    assert one.cases == SINGLES + PAIRS + len(DEEDS) * ENDS


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("deed", ["", *DEEDS])
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
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pair(explorer, shape, chunk, record_property):
    one = explorer(shape)
    played = sum(pairs(one, cut) for cut in cuts(one.steps())[chunk::CHUNKS])
    record_property("cases", (f"pairs of interruptions: {shape}", played))
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
