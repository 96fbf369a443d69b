# SPDX-License-Identifier: GPL-2.0-or-later
"""The page of `report`: nothing that comes from outside becomes a part of it, and it fetches nothing."""

import base64
import hashlib
import re
import struct
import zlib
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from backupctl.names import DiskName, PointId, VmName
from backupctl.operations.check import Finding, Level, Verdict
from backupctl.operations.prune.retention import Decision, Rules
from backupctl.operations.report.facts import (
    BadPoint,
    DiskMap,
    LastResult,
    LastResults,
    MapRow,
    PointFacts,
    Report,
    RepositoryFacts,
    RunFacts,
    VmFacts,
)
from backupctl.outcome.html import map_image, markup, page, words
from backupctl.outcome.html.markup import Markup, tag, text
from backupctl.repository.tested import RestoreTests

NOW = datetime(2026, 3, 1, tzinfo=UTC)
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)",
    "</td></table></main><iframe src=//evil>",
    "&lt;script&gt;",
    "\x1b[31m\u202e\x00\n",
    "\udcff",
)


def point(number: int, **changes: Any) -> PointFacts:
    taken = NOW - timedelta(days=10 - number)
    made = PointFacts(
        id=PointId(f"{taken:%Y%m%dT%H%M%SZ}"),
        taken=taken,
        seconds=31.0,
        kind="incremental" if number else "full",
        parent=None,
        consistency="filesystem",
        frozen_ms=40,
        stored_bytes=(number + 1) << 20,
        copied_bytes=1 << 20,
        disks=(DiskName("vda"),),
        layers=number + 1,
        protected=number == 2,
        decision=Decision(PointId("x"), keep=number != 1, reasons=("daily 1 of 7",)),
        broken=("vda: its map is lost",) if number == 3 else (),
    )
    return replace(made, **changes)


def report() -> Report:
    points = [point(0)]
    for number in range(1, 5):
        points.append(point(number, parent=points[-1].id))
    points.append(point(5, parent=points[0].id, kind="mixed"))
    rows = (MapRow(points[0].id, 1 << 20, bytes([255, 0, 9, 0])), MapRow(points[1].id, 1, problem="lost"))
    vm = VmFacts(
        VmName("web"),
        Verdict("web", (Finding(Level.CRITICAL, "a point is damaged"), Finding(Level.OK, "young"))),
        tuple(points),
        (
            BadPoint("20260101T000000Z", "no manifest", unreadable=False),
            BadPoint("b", "denied", unreadable=True),
        ),
        Rules(daily=7, within=timedelta(days=2)),
        last=LastResults(
            LastResult("run", NOW, 9.0, "ReadFailed"), LastResult("verify", NOW, 9.0, partial=True), None
        ),
        maps=(DiskMap(DiskName("vda"), 4 * 65536, 4, rows, 123),),
        run=RunFacts("full", PointId("20260301T000000Z"), 200, 7, "copying", 1 << 20, 4 << 20, True, 90),
        tested=RestoreTests(
            PointId("20260228T000000Z"), "2026-02-28T00:00:00Z", False, "2026-02-20T00:00:00Z"
        ),
    )
    empty = VmFacts(VmName("new"), Verdict("new", (Finding(Level.CRITICAL, "no point"),)))
    refused = replace(vm, name=VmName("db"), maps=(), pruning_problem="a manifest is damaged")
    return Report(
        NOW,
        "1.0",
        (RepositoryFacts("/backup", (vm, empty, refused)), RepositoryFacts("/gone", (), "no such")),
    )


def with_texts(found: Any, hostile: str) -> Any:
    """Return the same facts with another text in each field that has one."""
    if isinstance(found, str):
        return hostile
    if isinstance(found, tuple):
        return tuple(with_texts(one, hostile) for one in found)
    if is_dataclass(found) and not isinstance(found, type):
        kept = {PointFacts: ("kind",), RestoreTests: ("last_passed",)}.get(type(found), ())
        return replace(
            found,
            **{
                one.name: with_texts(getattr(found, one.name), hostile)
                for one in fields(found)
                if one.init and one.name not in kept
            },
        )
    return found


class Skeleton(HTMLParser):
    """The tags of a page with the names of their attributes, and the texts apart."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(content.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        self.tags.append((f"/{tag}", ()))

    def handle_data(self, data):
        self.texts.append(data)


def shape(content: bytes) -> list[tuple[str, tuple[str, ...]]]:
    """Return the tags without those of drawings, whose number depends on ids of points."""
    return [one for one in Skeleton(content).tags if one[0].strip("/") != "path"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_from_outside_becomes_a_tag_or_an_attribute(hostile):
    clean = page.render(with_texts(report(), "harmless"))
    found = page.render(with_texts(report(), hostile))
    assert shape(found) == shape(clean)
    assert found.count(b"<script>") == 1
    assert b"\x1b" not in found
    assert "\u202e".encode() not in found


def test_a_hostile_text_is_shown_as_it_is():
    found = Skeleton(page.render(with_texts(report(), HOSTILE[0])))
    assert any(HOSTILE[0] in one for one in found.texts)


def test_the_page_has_no_handler_no_inline_style_and_no_address_but_its_own():
    found = Skeleton(page.render(report()))
    for name, attribute, value in found.values:
        assert not attribute.startswith("on")
        assert attribute != "style"
        if attribute in ("href", "src"):
            assert value.startswith(("#", "data:image/png;base64,")) or value == "data:,", (name, value)
    assert not re.search(rb"url\(|@import|https?:", page.render(report()))


def test_the_policy_allows_the_style_and_the_script_that_are_there_and_nothing_else():
    content = page.render(report()).decode()
    policy = re.search(r'http-equiv="?Content-Security-Policy"? content="([^"]+)"', content)[1]
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        inner = re.search(rf"<{element}>(.*?)</{element}>", content, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{directive} &#x27;sha256-{digest}&#x27;;" in policy
    assert policy.startswith("default-src &#x27;none&#x27;;")


def test_a_page_begins_with_the_mark_by_which_it_is_known():
    assert page.render(report()).startswith(page.MARK)
    assert page.render(Report(NOW, "1.0", ())).startswith(page.MARK)


def test_every_point_is_in_the_table_also_the_damaged_ones():
    found = page.render(report()).decode()
    for one in report().repositories[0].vms[0].points:
        assert f"<th scope=row>{one.id}" in found
    assert "damaged: no manifest" in found
    assert "cannot be read: denied" in found
    assert "damaged: vda: its map is lost" in found


def test_what_the_next_prune_does_is_said():
    vm = report().repositories[0].vms[0]
    assert words.next_prune(vm) == "drops 1 point of 6 (rules: 7 daily, all within 48 h)"
    assert words.next_prune(replace(vm, pruning_problem="damaged")) == "nothing can be pruned: damaged"
    assert words.next_prune(replace(vm, rules=Rules())) == "no retention rules: nothing is dropped"


def test_what_works_on_a_vm_now_is_said():
    run = report().repositories[0].vms[0].run
    said = "full to 20260301T000000Z, for 3 min: step 7 of 10, copying, 25 % of about 4.0 MiB, 90 s left"
    assert words.doing(run) == said
    assert (
        words.doing(replace(run, total_bytes=0, step=None)) == "full to 20260301T000000Z, for 3 min: copying"
    )
    assert words.doing(RunFacts("other")) == "a command works on it"
    assert words.doing(None) == ""


def test_the_last_restore_test_is_said():
    vm = report().repositories[0].vms[0]
    assert words.restore_test(vm.tested, NOW) == "20260228T000000Z did not boot (one booted 9 d ago)"
    passed = replace(vm.tested, passed=True, last_passed="2026-02-28T00:00:00Z")
    assert words.restore_test(passed, NOW) == "20260228T000000Z booted 24 h ago"


def test_each_chain_is_drawn_and_a_differential_as_an_arc():
    found = page.render(report()).decode()
    drawn = re.search(r'<path class=link d="([^"]+)"', found)[1]
    assert drawn.count("H") == 4
    assert drawn.count("C") == 1


def test_a_heading_follows_the_one_above_it_and_no_id_is_used_twice():
    found = Skeleton(page.render(report()))
    levels = [int(name[1]) for name, _ in found.tags if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [value for _, name, value in found.values if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_style_sheet_that_would_end_its_element_is_refused():
    with pytest.raises(ValueError, match="would end"):
        markup.verbatim("a</style>")


def test_what_is_markup_already_is_not_escaped_again():
    assert tag("p", tag("b", "<"), "<", data_x='"') == '<p data-x="&quot;"><b>&lt;</b>&lt;</p>'
    assert text(Markup("<br>")) == "<br>"


def test_the_picture_is_a_png_of_these_rows():
    rows = [bytes([0, 1, 63, 64, 128, 255]), bytes(6)]
    content = map_image.of(rows, 6)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        chunks[kind] = content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            content[at + 4 : at + 8 + length]
        )
        at += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (6, 2)
    assert zlib.decompress(chunks[b"IDAT"]) == b"\0\x00\x01\x01\x02\x03\x04" + bytes(7)
