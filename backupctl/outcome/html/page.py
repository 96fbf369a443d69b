# SPDX-License-Identifier: GPL-2.0-or-later
"""The page of `report --html`: one file that needs nothing else, and fetches nothing.

Its policy (Content-Security-Policy) allows the one style sheet and the one script that are in it, by their
hashes, and pictures that are in it. The script only adds to what is there: the page is whole without it.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

from backupctl.operations.report.facts import Report, RepositoryFacts, VmFacts
from backupctl.outcome.html import vm_section, words
from backupctl.outcome.html.markup import Markup, document, tag, verbatim
from backupctl.outcome.html.timeline import Scale

MARK = b'<!doctype html>\n<html lang=en data-made-by="backupctl report">'
"""How each of these files begins; one that does not is never replaced without being asked to."""
_COLUMNS = ("VM", "State", "Newest point", "Points", "Stored", "Layers", "Last verify", "Next prune drops")


def render(report: Report, live: str | None = None) -> bytes:
    """Return the page as a file's content. live: its version, of a page that `live.py` serves."""
    style, script = _of_ours("report.css"), _of_ours("report.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if live else "")
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),  # else a browser asks the server for one
        tag("title", "Backup report"),
        tag("style", style),
    )
    body = tag(
        "body",
        tag("a", "Skip to the VMs", href="#vms", class_="skip"),
        _header(report),
        tag("p", role="status", class_="live", hidden=True) if live else "",
        tag("main", *_sections(report), id="vms"),
        _footer(report),
        tag("script", script),
        data_live=live,
    )
    html = tag("html", head, body, lang="en", data_made_by="backupctl report")
    return document(html).encode()


def _of_ours(name: str) -> Markup:
    return verbatim(Path(__file__).with_name(name).read_text())


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _header(report: Report) -> Markup:
    vms = report.vms
    points = sum(vm.count for vm in vms)
    stored = words.size(sum(vm.stored_bytes for vm in vms))
    bad = sum(bool(vm.verdict.level) for vm in vms) + sum(bool(one.problem) for one in report.repositories)
    said = f"{words.number(len(vms), 'VM')}, {words.number(points, 'point')}, {stored} stored"
    state = f"{bad} need attention" if bad else "all OK" if vms else "no VM"
    return tag(
        "header",
        tag("h1", "Backup report"),
        tag("p", tag("strong", state, class_="bad" if bad else "ok"), f" · {said}", class_="summary"),
        tag("p", f"As of {words.time_of(report.made)}. All times are in UTC.", class_="made"),
    )


def _footer(report: Report) -> Markup:
    return tag(
        "footer",
        tag("p", f"Made by backupctl {report.version}. Ages are as of {words.time_of(report.made)} UTC."),
        tag("p", "The stored data itself is only read by verify; what is on this page is from manifests, "
            "histories, image headers and digest maps."),
    )  # fmt: skip


def _sections(report: Report) -> Iterable[Markup]:
    for number, one in enumerate(report.repositories):
        yield _repository(one, number, report)


def _repository(one: RepositoryFacts, number: int, report: Report) -> Markup:
    heading = f"repository-{number}"
    keys = [f"vm-{number}-{count}" for count in range(len(one.vms))]
    scale = Scale.of(one.vms, report.made)
    content = [
        vm_section.section(vm, number, key, scale, report.made) for vm, key in zip(one.vms, keys, strict=True)
    ]
    return tag(
        "section",
        tag("h2", "Repository ", tag("code", one.path), id=heading),
        tag("p", tag("strong", "Cannot be opened: "), one.problem, class_="findings bad")
        if one.problem
        else "",
        _overview(one, keys, report) if one.vms else "",
        tag("p", "There is no VM in it.") if not one.vms and not one.problem else "",
        *content,
        aria_labelledby=heading,
    )


def _overview(one: RepositoryFacts, keys: Iterable[str], report: Report) -> Markup:
    rows = (_overview_row(vm, key, report) for vm, key in zip(one.vms, keys, strict=True))
    head = tag("tr", *(tag("th", name, scope="col") for name in _COLUMNS))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="overview")
    return tag("div", table, class_="scroll", role="region", aria_label=f"VMs in {one.path}", tabindex=0)


def _overview_row(vm: VmFacts, key: str, report: Report) -> Markup:
    newest = vm.points[-1] if vm.points else None
    layers = None if newest is None else newest.layers
    verify = vm.last.verify if vm.last else None
    verified = words.NONE
    if verify is not None:
        verified = f"{verify.reason or 'no damage'}, {words.age(verify.ended, report.made)}"
    return tag(
        "tr",
        tag("th", tag("a", vm.name, href=f"#{key}"), scope="row"),
        tag("td", vm_section.badge(vm)),
        tag("td", words.age(newest.taken, report.made) if newest else "none"),
        tag("td", vm.count, class_="n"),
        tag("td", words.size(vm.stored_bytes), class_="n"),
        tag("td", words.NONE if layers is None else layers, class_="n"),
        tag("td", verified),
        tag("td", words.NONE if vm.rules.hold_nothing() else len(vm.dropped), class_="n"),
    )
