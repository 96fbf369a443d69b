# SPDX-License-Identifier: GPL-2.0-or-later
"""What `doctor` says of one thing that it looked at."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    verdict: bad is what makes a run fail. advice: what to do about it, or "".
    """

    subject: str
    verdict: Verdict
    said: str
    advice: str = ""
