# SPDX-License-Identifier: GPL-2.0-or-later
"""Does to a command what a fault wants, in place of doing and answering it."""

import asyncio
from collections.abc import Callable

from backupctl.simulator.channel import HangUp
from backupctl.simulator.faults import ENDS, Fault

GARBAGE = b'\x00{"return"}]] nonsense\n'
Answer = Callable[[], bytes]


async def carry_out(
    fault: Fault,
    do: Answer,
    refuse: Callable[[str], bytes],
    reply: Callable[[object], bytes],
    post: Callable[[bytes], None],
    end: Callable[[str], None],
) -> None:
    """Carry a fault out.

    do: does the command and returns its answer. refuse: returns an error answer. reply: returns the answer
    with a value. post: sends.
    end: ends the machine in one of the ways of `faults.ENDS`. Raises HangUp to close the connection.
    """
    deed = fault.deed
    if deed in ENDS:
        end(deed)
        raise HangUp
    if deed == "hangup":
        raise HangUp
    refusal = refuse(fault.argument or "as a fault wanted it")
    if deed in ("silent", "garbage", "error", "answer"):
        answers = {"silent": b"", "garbage": GARBAGE, "error": refusal}
        post(reply(fault.value) if deed == "answer" else answers[deed])
        return
    answer = do()
    if deed == "error-after":
        post(refusal)
        return
    if deed.endswith("-after"):
        end(deed.removesuffix("-after"))
        raise HangUp
    if deed == "lost":
        raise HangUp
    if deed == "late":
        await asyncio.sleep(fault.seconds)
        post(answer)
