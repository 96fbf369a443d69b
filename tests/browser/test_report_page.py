# SPDX-License-Identifier: GPL-2.0-or-later
"""The page of `report` in a real browser: how it looks, how it is used, and what a screen reader gets."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from backupctl.cli.main import cli
from backupctl.names import VmName
from backupctl.repository import activity, history
from backupctl.repository.activity import Activity
from backupctl.repository.history import PointEvent
from backupctl.repository.repository import Repository
from fixtures import browser as browsers
from fixtures import report_repository
from fixtures.debian import CannotBeHad
from tests.unit.points import P1, Builder

SMALL = 1 << 20
MACHINES = (
    report_repository.Machine(
        "web", {"vda": 64 * SMALL, "vdb": 32 * SMALL}, 24, full_every=8, protected=(3,)
    ),
    report_repository.Machine("db", {"vda": 64 * SMALL}, 12, differential=True, damaged=(2,)),
    report_repository.Machine("the-name-that-is-as-long-as-it-may-be-" + "x" * 24, {"vda": SMALL}, 1),
)
LOOKS = [(width, dark) for width in (1280, 390) for dark in (False, True)]
CONTRAST = "color-contrast"

pytestmark = pytest.mark.xdist_group("browser")


def _not_available(why: str) -> None:
    """Skip, or fail where all must be there, as in CI."""
    if os.environ.get("BACKUPCTL_REQUIRE_BROWSER"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A report on three VMs."""
    directory = tmp_path_factory.mktemp("report")
    now = datetime.now(UTC)
    report_repository.make(directory / "repository", MACHINES, now)
    config = report_repository.configure(directory, MACHINES, now)
    CliRunner().invoke(cli, ["report", "--config", str(config), "--html", str(directory / "report.html")])
    return directory / "report.html"


@pytest.fixture(scope="module")
def window():
    """A browser. Where the platform has none, there is nothing to test; a broken one is a failure."""
    if missing := [name for name in browsers.PROGRAMS if shutil.which(name) is None]:
        _not_available(f"{' and '.join(missing)}: not installed here")
    with browsers.browser() as found:
        yield found


@pytest.fixture
def page(window, path):
    """The report, loaded anew."""
    window.look(1280)
    window.open(path)
    yield window
    assert window.messages() == []


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_the_page_fits_the_window_and_follows_the_colour_scheme(page, path, tmp_path, width, dark):
    page.look(width, dark=dark)
    page.open(path)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    background = page.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(", "))) < 384) == dark
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_axe_finds_nothing(window, path, width, dark):
    try:
        script = browsers.axe()
    except CannotBeHad as err:
        _not_available(f"axe-core is not available here: {err}")
    window.look(width, dark=dark)
    window.devtools("Page.setBypassCSP", {"enabled": True})
    try:
        window.open(path)
        window.run("for (const one of document.querySelectorAll('details')) one.open = true")
        window.run(script)
        found = window.run("return axe.run()")
    finally:
        window.devtools("Page.setBypassCSP", {"enabled": False})
        window.open(path)
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found["violations"]] == []
    assert CONTRAST in {one["id"] for one in found["passes"]}


def test_the_keyboard_reaches_every_part_and_walks_along_the_time_line(page):
    def focused() -> str:
        return page.run("const one = document.activeElement; return one.className || one.tagName")

    page.press("Tab")
    assert focused() == "skip"
    seen = []
    while "area" not in seen and len(seen) < 12:
        page.press("Tab")
        seen.append(focused())
    assert seen == ["scroll", "A", "A", "A", "area"]
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"

    def value() -> tuple[str, str]:
        return tuple(
            page.run(
                "const one = document.activeElement;"
                "return [one.getAttribute('aria-valuenow'), one.getAttribute('aria-valuetext')]"
            )
        )

    points = page.run(
        "const figure = document.activeElement.closest('figure');"
        "const table = document.getElementById(figure.dataset.table);"
        "return Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent).reverse()"
    )
    assert (value()[0], value()[1].split(" ")[0]) == (str(len(points)), points[-1])
    page.press("ArrowLeft")
    assert (value()[0], value()[1].split(" ")[0]) == (str(len(points) - 1), points[-2])
    page.press("Home", "ArrowLeft", "ArrowRight")
    assert (value()[0], value()[1].split(" ")[0]) == ("2", points[1])
    page.press("End", "ArrowRight")
    assert value()[0] == str(len(points))
    page.press("Enter")
    assert page.run(
        "return document.activeElement.closest('section').querySelector('table[id]').closest('details').open"
    )


def test_a_screen_reader_gets_landmarks_headings_and_a_name_for_each_part(page):
    tree = page.devtools("Accessibility.getFullAXTree", {})["nodes"]
    roles: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {"main", "banner", "contentinfo"} <= roles.keys()
    assert roles["slider"] == [f"Points of {one.name}" for one in sorted_machines()]
    assert all(name.startswith("Map of vd") for name in roles["image"])
    assert len(roles["image"]) == sum(len(one.disks) for one in MACHINES)
    assert all(roles["region"])


def sorted_machines():
    return sorted(MACHINES, key=lambda one: one.name)


def test_a_pointer_over_the_time_line_shows_the_nearest_point(page):
    shown = page.run(
        "const area = document.querySelectorAll('.area')[2], box = area.getBoundingClientRect();"
        "area.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 1, bubbles: true}));"
        "return [area.ariaValueNow, area.closest('figure').querySelector('.readout').textContent]"
    )
    assert shown[0] == "1"
    assert "kind full" in shown[1]


def test_the_page_asks_the_network_for_nothing_and_runs_no_foreign_script(page):
    asked = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [one for one in asked if not one.startswith("data:")] == []
    ran = page.run(
        "const made = document.createElement('script'); made.textContent = 'window.ran = 1';"
        "document.body.append(made); return window.ran === undefined"
    )
    assert ran
    assert any("Content Security Policy" in one for one in page.messages())


def test_a_served_page_shows_a_run_as_it_works_and_says_when_points_come(window, path):
    command = [sys.executable, "-m", "backupctl", "report", "--config", str(path.parent / "backupctl.toml")]
    repository = Repository.open(path.parent / "repository")
    builder = Builder(repository)
    directory = repository.vm(VmName("vm1"))
    shown = "document.querySelector('[data-vm=vm1] .now')"
    with subprocess.Popen([*command, "--web", "0", "--json"], stdout=subprocess.PIPE, text=True) as server:
        try:
            builder.begin(P1).drop()  # which makes the VM known
            window.visit(json.loads("".join(itertools.islice(server.stdout, 3)))["uri"])
            assert window.run(f"return {shown}.hidden")
            with directory.lock() as lock:
                now = activity.stamp(datetime.now(UTC))
                activity.write(lock, Activity("full", os.getpid(), "copy", P1, now, now, (), 1, 4))
                window.wait(f"!{shown}.hidden && {shown}.textContent.includes('full to {P1}')")
                assert window.run(f"return {shown}.textContent.includes('25 %')")
            window.wait(f"{shown}.hidden")
            assert window.run("return document.querySelector('.live').hidden")
            with directory.lock():
                history.record(directory.path, PointEvent("dropped", P1))
            window.wait("document.querySelector('.live').textContent.startsWith('Points have come or gone')")
            assert window.messages() == []
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
    window.wait("document.querySelector('.live').textContent.startsWith('backupctl does not answer')")
    window.visit("about:blank")
    window.messages()  # that the server is gone is in the console, too


def test_every_drawing_is_drawn(page):
    """A path that is nested in another one is not."""
    assert page.run(
        "return Array.from(document.querySelectorAll('path')).every((one) => !one.children.length)"
    )
    boxes = page.run("return Array.from(document.querySelectorAll('path.dot'), (one) => one.getBBox().width)")
    assert len(boxes) >= 6
    assert page.run("return Array.from(document.images).every((one) => one.complete && one.naturalWidth > 0)")
