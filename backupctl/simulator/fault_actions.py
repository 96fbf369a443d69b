# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fault does to a command, instead of running and answering it."""

import asyncio
from collections.abc import Callable

from backupctl.simulator.channel import HangUp
from backupctl.simulator.faults import TERMINATIONS, Fault

GARBAGE = b'\x00{"return"}]] nonsense\n'
Answer = Callable[[], bytes]


async def carry_out(
    fault: Fault,
    do: Answer,
    refuse: Callable[[str], bytes],
    reply: Callable[[object], bytes],
    post: Callable[[bytes], None],
    terminate: Callable[[str], None],
) -> None:
    """Carry a fault out. Raises HangUp to close the connection.

    do: runs the command and returns its answer. refuse: returns an error answer. reply: returns an answer
    with a value. post: sends. terminate: ends the machine in one of the ways of `faults.TERMINATIONS`.
    """
    action = fault.action
    if action in TERMINATIONS:
        terminate(action)
        raise HangUp
    if action == "hangup":
        raise HangUp
    refusal = refuse(fault.argument or "injected by a fault")
    if action in ("silent", "garbage", "error", "answer"):
        answers = {"silent": b"", "garbage": GARBAGE, "error": refusal}
        post(reply(fault.value) if action == "answer" else answers[action])
        return
    answer = do()
    if action == "error-after":
        post(refusal)
        return
    if action.endswith("-after"):
        terminate(action.removesuffix("-after"))
        raise HangUp
    if action == "lost":
        raise HangUp
    if action == "late":
        await asyncio.sleep(fault.seconds)
        post(answer)
