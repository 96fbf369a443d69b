# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the page about one VM: state, time line, maps of its disks, and a table of its points."""

from collections.abc import Iterable
from datetime import datetime

from backupctl.digests.clusters import CLUSTER_BYTES
from backupctl.operations.report.facts import BadPoint, DiskMap, MapRow, PointFacts, VmFacts
from backupctl.outcome.html import map_image, timeline, words
from backupctl.outcome.html.markup import Content, Markup, each, tag
from backupctl.outcome.html.timeline import Scale

_MOST_RANGES = 6
_ROW_PIXELS = 6
_COLUMNS = (
    *("Point", "Taken", "Kind", "Stored", "Took", "Frozen", "Layers", "Parent", "Consistency"),
    *("Next prune", "Notes"),
)


def badge(vm: VmFacts) -> Markup:
    """Return the state of a VM as a word."""
    class_, word = words.LEVELS[vm.verdict.level]
    return tag("span", word, class_=f"badge {class_}")


def section(vm: VmFacts, repository: int, key: str, scale: Scale, now: datetime) -> Markup:
    """Return the part about one VM. repository: its number. key: an id that no other part of the page has."""
    return tag(
        "section",
        tag("h3", vm.name, " ", badge(vm), id=key),
        _findings(vm),
        _facts(vm, now),
        _figure(vm, key, scale) if vm.points else "",
        _maps(vm),
        _table(vm, f"{key}-points", scale) if vm.points or vm.bad else "",
        class_="vm",
        aria_labelledby=key,
        data_vm=vm.name,
        data_repository=repository,
    )


def _findings(vm: VmFacts) -> Markup:
    found = [one for one in vm.verdict.findings if one.level]
    if not found:
        return Markup()
    items = (
        tag(
            "li",
            tag("strong", f"{words.LEVELS[one.level][1]}: "),
            one.text,
            class_=words.LEVELS[one.level][0],
        )
        for one in found
    )
    return tag("ul", *items, class_="findings")


def _facts(vm: VmFacts, now: datetime) -> Markup:
    newest = vm.points[-1] if vm.points else None
    said: list[tuple[str, Content]] = [
        (
            "Newest point",
            f"{words.time_of(newest.taken)}, {words.age(newest.taken, now)}" if newest else "none",
        ),
        ("Points", f"{vm.count}, storing {words.size(vm.stored_bytes)}"),
        ("Next prune", words.next_prune(vm)),
    ]
    if vm.older:
        rest = f"{vm.older.count}, from {words.time_of(vm.older.oldest)} on, "
        rest += f"storing {words.size(vm.older.stored_bytes)}; not in the time line and the table"
        said.append(("Older points", rest))
    if vm.last is not None:
        said += [
            ("Last backup", words.result(vm.last.backup, now)),
            ("Last verify", words.result(vm.last.verify, now)),
        ]
    else:
        said.append(("Last verify", "not known: the VM is not in the configuration"))
    if vm.tested is not None:
        said.append(("Last restore test", words.restore_test(vm.tested, now)))
    entries = [tag("div", tag("dt", name), tag("dd", value)) for name, value in said]
    doing = words.doing(vm.run)
    entries.append(tag("div", tag("dt", "Now"), tag("dd", doing), class_="now", hidden=not doing))
    return tag("dl", *entries)


def _figure(vm: VmFacts, key: str, scale: Scale) -> Markup:
    legend = [("full", "full"), ("incremental", "incremental")]
    if any(point.kind == "mixed" for point in vm.points):
        legend.append(("mixed", "mixed"))
    if vm.dropped:
        legend.append(("gone", "dropped by the next prune"))
    if any(point.broken for point in vm.points):
        legend.append(("broken", "damaged"))
    if any(point.protected for point in vm.points):
        legend.append(("pin", "protected"))
    caption = tag(
        "figcaption",
        tag("span", f"Time line of {words.number(len(vm.points), 'point')} of {vm.name}. ", class_="hidden"),
        *(tag("span", tag("i", class_=f"key {class_}"), name, class_="entry") for class_, name in legend),
        tag("span", "heights of stored and took: square roots", class_="entry"),
    )
    return tag(
        "figure",
        timeline.draw(vm, scale),
        tag("p", class_="readout", hidden=True),
        caption,
        class_="timeline",
        data_table=f"{key}-points",
        data_name=f"Points of {vm.name}",
    )


def _maps(vm: VmFacts) -> Markup:
    drawn = [one for one in vm.maps if any(row.shares for row in one.rows)]
    if not drawn:
        return Markup()
    return tag("div", *(_map(one, vm.name) for one in drawn), class_="maps")


def _map(one: DiskMap, vm: str) -> Markup:
    rows = tuple(reversed(one.rows))
    shown = [row.shares or bytes(one.columns) for row in rows]
    chain = f", chain of the newest: {words.size(one.chain_bytes)}" if one.chain_bytes is not None else ""
    alternative = (
        f"Map of {one.disk} of {vm}: the parts that each of {words.number(len(rows), 'point')} stores"
    )
    return tag(
        "figure",
        tag("figcaption", tag("b", one.disk), f" {words.size(one.size_bytes)}{chain}"),
        tag(
            "div",
            tag("div", tag("span", "newest"), tag("span", "oldest"), class_="ages"),
            tag(
                "img",
                src=map_image.data_url(shown, one.columns),
                alt=alternative,
                width=one.columns,
                height=len(shown) * _ROW_PIXELS,
            ),
            class_="map",
        ),
        tag("div", tag("span", "0"), tag("span", words.size(one.size_bytes)), class_="axis"),
        _map_table(one, rows, vm),
        class_="disk",
    )


def _map_table(one: DiskMap, rows: Iterable[MapRow], vm: str) -> Markup:
    body = (
        tag(
            "tr",
            tag("th", row.point, scope="row"),
            tag("td", words.size(row.stored_bytes), class_="n"),
            tag("td", row.problem or _ranges(one, row)),
        )
        for row in rows
    )
    head = tag("tr", *(tag("th", name, scope="col") for name in ("Point", "Stored", "Where")))
    return tag(
        "details",
        tag("summary", f"The map of {one.disk} as a table"),
        _scrolled(tag("table", tag("thead", head), tag("tbody", *body)), f"The map of {one.disk} of {vm}"),
    )


def _ranges(one: DiskMap, row: MapRow) -> str:
    """Return the parts that a point stores, as ranges of bytes; the parts of the map are exact enough."""
    runs: list[list[int]] = []
    for part, share in enumerate(row.shares):
        if share and runs and runs[-1][1] == part:
            runs[-1][1] = part + 1
        elif share:
            runs.append([part, part + 1])
    if not runs:
        return "nothing"
    said = [f"{words.size(_at(one, begin), 2)} to {words.size(_at(one, end), 2)}" for begin, end in runs]
    more = f"; and {words.number(len(said) - _MOST_RANGES, 'more range')}" if len(said) > _MOST_RANGES else ""
    return "; ".join(said[:_MOST_RANGES]) + more


def _at(one: DiskMap, part: int) -> int:
    clusters = -(-one.size_bytes // CLUSTER_BYTES)
    return min(one.size_bytes, -(-part * clusters // one.columns) * CLUSTER_BYTES)


def _table(vm: VmFacts, key: str, scale: Scale) -> Markup:
    rows = [
        *((point.id, _row(point, scale.x(point.taken))) for point in vm.points),
        *((bad.id, _bad_row(bad)) for bad in vm.bad),
    ]
    body = (row for _, row in sorted(rows, reverse=True))
    head = tag("tr", *(tag("th", name, scope="col") for name in _COLUMNS))
    count = words.number(len(rows), "point")
    newest = f"the newest {len(rows)} of {words.number(vm.count, 'point')}" if vm.older else count
    return tag(
        "details",
        tag("summary", f"Table of {newest}"),
        _scrolled(tag("table", tag("thead", head), tag("tbody", *body), id=key), f"Points of {vm.name}"),
    )


def _row(point: PointFacts, x: int) -> Markup:
    notes = [f"damaged: {why}" for why in point.broken] + (["protected"] if point.protected else [])
    return tag(
        "tr",
        tag("th", point.id, scope="row"),
        each(
            "td",
            (
                words.time_of(point.taken),
                point.kind,
                words.size(point.stored_bytes),
                words.duration(point.seconds),
                words.frozen(point.frozen_ms),
                words.NONE if point.layers is None else point.layers,
                point.parent or words.NONE,
                point.consistency,
                words.retention(point),
                "; ".join(notes),
            ),
        ),
        class_="broken" if point.broken else "gone" if point.is_dropped else None,
        data_x=x,
    )


def _bad_row(bad: BadPoint) -> Markup:
    what = "cannot be read" if bad.unreadable else "damaged"
    said = tag("td", f"{what}: {bad.message}", colspan=len(_COLUMNS) - 1)
    return tag("tr", tag("th", bad.id, scope="row"), said, class_="broken")


def _scrolled(table: Markup, name: str) -> Markup:
    """Return a wide table in a part of the page that scrolls by itself, by the keyboard as well."""
    return tag("div", table, class_="scroll", role="region", aria_label=name, tabindex=0)
