# SPDX-License-Identifier: GPL-2.0-or-later
"""The time line of a VM's points, drawn: chains, stored bytes, duration and time frozen, in lanes.

Each lane is 1000 units wide and is stretched to the width of the page. Strokes keep their width, and a stroke
of length 0 with a round end is a dot. All that is drawn is in the table of the points as well.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from backupctl.names import PointId
from backupctl.operations.report.facts import PointFacts, VmFacts
from backupctl.outcome.html import words
from backupctl.outcome.html.markup import Markup, join, tag

WIDTH = 1000
_MARGIN = 8
_CHAINS, _TALL, _LOW = 26, 56, 22
_DOTS_Y = 17


@dataclass(frozen=True)
class Scale:
    """From when to when a time line goes."""

    begin: datetime
    end: datetime

    @classmethod
    def of(cls, vms: Iterable[VmFacts], now: datetime) -> "Scale":
        """Return one scale for VMs that are to be compared: from the oldest point to now."""
        taken = [point.taken for vm in vms for point in vm.points]
        return cls(min(taken, default=now), max([now, *taken]))

    def x(self, when: datetime) -> int:
        """Return where a time is, in units."""
        span = (self.end - self.begin).total_seconds()
        share = (when - self.begin).total_seconds() / span if span else 1.0
        return round(_MARGIN + (WIDTH - 2 * _MARGIN) * min(1.0, max(0.0, share)))

    def dates(self, wanted: int = 3) -> list[str]:
        """Return dates at equal distances, from the begin to the end."""
        step = (self.end - self.begin) / (wanted - 1)
        return [f"{self.begin + step * number:%Y-%m-%d}" for number in range(wanted)]


def draw(vm: VmFacts, scale: Scale) -> Markup:
    """Return the lanes of a VM, and the axis below them."""
    drawn = _Points(vm.points, scale)
    return tag(
        "div",
        _lane("Chains", "", _CHAINS, drawn.chains()),
        _lane("Stored", _most(vm.points, lambda one: one.stored_bytes, words.size), _TALL, drawn.stored()),
        _lane("Took", _most(vm.points, lambda one: one.seconds, words.duration), _LOW, drawn.seconds()),
        _lane("Frozen", _most(vm.points, lambda one: one.frozen_ms or 0, words.frozen), _LOW, drawn.frozen()),
        tag("div", *(tag("span", date) for date in scale.dates()), class_="axis"),
        tag("div", tag("div", class_="cursor"), class_="area", hidden=True),
        class_="lanes",
    )


@dataclass(frozen=True)
class _Points:
    points: Sequence[PointFacts]
    scale: Scale

    def chains(self) -> Iterable[Markup]:
        """Return lines from each point to the one that it is based on, and a dot for each point."""
        at = {point.id: self.scale.x(point.taken) for point in self.points}
        yield _path("link", self._links(at))
        for kind in ("full", "incremental", "mixed"):
            yield _path(f"dot {kind}", self._dots(point for point in self.points if point.kind == kind))
        yield _path("dot gone", self._dots(point for point in self.points if point.is_dropped))
        yield _path("dot broken", self._dots(point for point in self.points if point.broken))
        yield _path(
            "pin", (f"M{self.scale.x(one.taken)} {_DOTS_Y + 5}v4" for one in self.points if one.protected)
        )

    def _links(self, at: dict[PointId, int]) -> Iterable[str]:
        before: PointId | None = None
        for point in self.points:
            here = at[point.id]
            there = at.get(point.parent) if point.parent else None
            if there is not None and point.parent == before:
                yield f"M{there} {_DOTS_Y}H{here}"
            elif there is not None:  # a differential: over the points between the two
                yield f"M{there} {_DOTS_Y}C{there} 2 {here} 2 {here} {_DOTS_Y}"
            before = point.id

    def _dots(self, points: Iterable[PointFacts]) -> Iterable[str]:
        return (f"M{self.scale.x(point.taken)} {_DOTS_Y}h0" for point in points)

    def stored(self) -> Iterable[Markup]:
        """Return a bar for each point, as high as the square root: a full must not hide the rest."""
        return self._bars(_TALL, lambda point: math.sqrt(point.stored_bytes))

    def seconds(self) -> Iterable[Markup]:
        """Return a bar for the duration of each run, as high as its square root."""
        return self._bars(_LOW, lambda point: math.sqrt(point.seconds))

    def frozen(self) -> Iterable[Markup]:
        """Return a bar for how long the guest was frozen."""
        return self._bars(_LOW, lambda point: float(point.frozen_ms or 0))

    def _bars(self, height: int, value: Callable[[PointFacts], float]) -> Iterable[Markup]:
        most = max(map(value, self.points), default=0.0)
        for kind in ("full", "incremental", "mixed", "gone"):
            bars = (
                f"M{self.scale.x(point.taken)} {height}v-{_length(value(point), most, height)}"
                for point in self.points
                if value(point) > 0 and _class(point) == kind
            )
            yield _path(f"bar {kind}", bars)


def _class(point: PointFacts) -> str:
    return "gone" if point.is_dropped else point.kind


def _length(value: float, most: float, height: int) -> int:
    return max(2, round((height - 4) * value / most)) if most else 0


def _path(class_: str, parts: Iterable[str]) -> Markup:
    """Return one path for all that look alike; nothing if there is none."""
    drawn = "".join(parts)
    return tag("path", class_=class_, d=drawn) if drawn else Markup()


def _lane(name: str, most: str, height: int, content: Iterable[Markup]) -> Markup:
    return tag(
        "div",
        tag("span", name, tag("span", most, class_="most") if most else "", class_="lane-name"),
        tag(
            "svg",
            join(content),
            viewBox=f"0 0 {WIDTH} {height}",
            height=height,
            preserveAspectRatio="none",
            aria_hidden="true",
        ),
        class_="lane",
    )


def _most(
    points: Sequence[PointFacts], value: Callable[[PointFacts], float], shown: Callable[[int], str]
) -> str:
    """Return what the tallest bar of a lane stands for."""
    most = max(map(value, points), default=0)
    return f"max {shown(round(most))}" if most else "none"
