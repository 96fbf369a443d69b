# SPDX-License-Identifier: GPL-2.0-or-later
"""Feed a parser with mutations of good inputs: `python -m tests.fuzz [TARGET…] [--seconds N] [--seed N]`.

Prints each input for which a parser raised what it does not document, and leaves with 1 if there was one.
"""

import argparse
import random
import time
import tracemalloc

from tests.fuzz.targets import TARGETS, Target

MOST_SECONDS = 5.0
MOST_MEMORY = 64 << 20
MOST_BYTES = 70_000
WORDS = (
    b"[" * 500,
    b"{",
    b"}",
    b'"',
    b"null",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"\\ud800",
    b"\0",
    b"\xff",
    b"../",
)


def mutate(chance: random.Random, content: bytes) -> bytes:
    """Change a few places: flip, cut, repeat, swap numbers, put in what hurts."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + chance.randrange(1, 20)]
            case 3:
                changed[at:at] = changed[at : at + chance.randrange(1, 200)]
            case 4:
                changed[at:at] = chance.choice(WORDS)
            case 5:
                changed[at : at + 8] = chance.randbytes(8)
            case _:
                changed[at:at] = chance.randbytes(chance.randrange(1, 5))
    return bytes(changed[:MOST_BYTES])


def complaint(target: Target, content: bytes) -> str:
    """Feed one input; say what is wrong, "" if nothing is."""
    begun = time.monotonic()
    tracemalloc.start()
    try:
        target.parse(content)
    except target.allowed:
        pass
    except Exception as err:
        return f"{type(err).__name__}: {err!s:.200}"
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if time.monotonic() - begun > MOST_SECONDS:
        return f"it took {time.monotonic() - begun:.0f} s"
    return f"it took {most >> 20} MiB" if most > MOST_MEMORY else ""


def fuzz(name: str, seconds: float, seed: int) -> bool:
    """Feed one target for so long; whether nothing was wrong."""
    target, chance = TARGETS[name], random.Random(seed)
    corpus, fed, taken, told = list(target.seeds), 0, 0, set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        content = mutate(chance, chance.choice(corpus))
        fed += 1
        if (wrong := complaint(target, content)) and wrong not in told:
            told.add(wrong)
            print(f"{name}: {wrong}\n  {content[:500]!r}")
        if len(corpus) < 200 and chance.random() < 0.02:  # walk away from the good ones
            corpus.append(content)
            taken += 1
    print(f"{name:<12} {fed:>8} inputs, {len(told)} wrong (seed {seed})")
    return not told


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all, if none is named")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each target")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--list", action="store_true", help="name the targets")
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(TARGETS))
        return 0
    fine = [fuzz(name, chosen.seconds, chosen.seed) for name in chosen.targets or TARGETS]
    return 0 if all(fine) else 1
