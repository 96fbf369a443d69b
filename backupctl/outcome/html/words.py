# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers and facts as the page says them."""

from datetime import datetime, timedelta

from backupctl.operations import check
from backupctl.operations.check import Level
from backupctl.operations.prune.retention import Rules
from backupctl.operations.report.facts import LastResult, PointFacts, RunFacts, VmFacts
from backupctl.operations.running import STEPS
from backupctl.repository.tested import RestoreTests

LEVELS = {
    Level.OK: ("ok", "OK"),
    Level.WARNING: ("warn", "Warning"),
    Level.CRITICAL: ("bad", "Critical"),
    Level.UNKNOWN: ("unknown", "Unknown"),
}
"""The class and the word of each state."""
NONE = "-"


def size(count: int, digits: int = 1) -> str:
    """Return a number of bytes: "1.5 GiB"."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            return f"{count} B" if unit == "B" else f"{amount:.{digits}f} {unit}"
        amount /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Return a duration: "41 s", "3 min", "2 h 5 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def time_of(when: datetime) -> str:
    """Return a time to the minute; the page says once that all are in UTC."""
    return f"{when:%Y-%m-%d %H:%M}"


def age(when: datetime, now: datetime) -> str:
    """Return how long ago something was: "26 h ago"."""
    past = now - when
    return f"{check.ago(past)} ago" if past >= timedelta(0) else f"in {check.ago(-past)}"


def number(count: int, what: str) -> str:
    """Return "1 point", "7 points"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def frozen(milliseconds: int | None) -> str:
    """Return how long the guest was frozen."""
    return NONE if milliseconds is None else f"{milliseconds} ms"


def rules(found: Rules) -> str:
    """Return retention rules: "7 daily, 4 weekly"."""
    names = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    said = [f"{getattr(found, name)} {name}" for name in names if getattr(found, name)]
    if found.within is not None:
        said.append(f"all within {check.ago(found.within)}")
    return ", ".join(said)


def retention(point: PointFacts) -> str:
    """Return what the next prune does with a point, and why."""
    if point.decision is None:
        return NONE
    if not point.decision.keep:
        return "drop"
    return f"keep: {', '.join(point.decision.reasons)}"


def next_prune(vm: VmFacts) -> str:
    """Return what the next prune of a VM does."""
    if vm.rules.hold_nothing():
        return "no retention rules: nothing is dropped"
    if vm.pruning_problem:
        return f"nothing can be pruned: {vm.pruning_problem}"
    said = rules(vm.rules)
    if not vm.dropped:
        return f"drops nothing (rules: {said})"
    return f"drops {number(len(vm.dropped), 'point')} of {vm.count} (rules: {said})"


def doing(run: RunFacts | None) -> str:
    """Return what works on a VM now, "" if nothing does."""
    if run is None:
        return ""
    if run.kind == "other":
        return "a command works on it"
    point = f" to {run.point}" if run.point else ""
    step = f"step {run.step} of {STEPS}, " if run.step else ""
    said = f"{run.kind}{point}, for {duration(run.elapsed_seconds)}: {step}{run.description}"
    if not run.total_bytes:
        return said
    percent = min(100, run.done_bytes * 100 // run.total_bytes)
    about = "about " if run.estimated else ""
    left = "" if run.left_seconds is None else f", {duration(run.left_seconds)} left"
    return f"{said}, {percent} % of {about}{size(run.total_bytes)}{left}"


def restore_test(found: RestoreTests, now: datetime) -> str:
    """Return how the last restore test of a VM ended."""
    how = "booted" if found.passed else "did not boot"
    passed = found.passed_at
    last = f" (one booted {age(passed, now)})" if passed and not found.passed else ""
    return f"{found.point} {how}{f' {age(passed, now)}' if passed and found.passed else ''}{last}"


def result(found: LastResult | None, now: datetime) -> str:
    """Return how the last command of a kind ended."""
    if found is None:
        return "none is known"
    how = f"failed ({found.reason})" if found.reason else "no damage" if found.command == "verify" else "ok"
    part = ", a part of the data" if found.partial else ""
    return f"{how}, {age(found.ended, now)}{part}, took {duration(found.seconds)}"
