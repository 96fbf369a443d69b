# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark measures what it says, and its page is what its results give."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from fixtures.bench import bitmaps, figures, meter, plot, quick, report, results, source
from fixtures.bench.latency import Writes
from fixtures.bench.meter import ProgramFailed
from fixtures.bench.results import GIB, Contest, Sample
from tests.conftest import ROOT

MIB = 1 << 20


def sample(seconds: float, **more) -> Sample:
    return Sample(seconds, GIB, **more)


def measure(program: str, timeout_seconds: float = 20.0) -> meter.Usage:
    command = [sys.executable, "-c", program]
    return meter.run(command, timeout_seconds=timeout_seconds, environment=os.environ)


SPIN = "import time\ntime.sleep(2)\nwhile time.process_time() < 0.4: pass\n"


def test_the_cpu_of_an_orphan_that_outlives_its_parent_is_counted_but_not_its_time():
    begun = time.monotonic()
    usage = measure(f"import os\nif os.fork() == 0:\n os.setsid()\n exec({SPIN!r})\n")
    with_orphan_seconds = time.monotonic() - begun
    assert 0.4 <= usage.cpu_seconds < 3
    assert usage.wall_seconds < with_orphan_seconds - 1


def test_the_memory_of_each_process_is_measured():
    usage = measure("import time; held = b'x' * (100 << 20); time.sleep(0.2)")
    (peak,) = usage.peak_mib.values()
    assert 100 < peak < 150
    assert usage.together_mib == pytest.approx(peak, abs=20)


def test_a_program_that_fails_or_hangs_is_reported():
    with pytest.raises(ProgramFailed, match="exit code 3"):
        measure("raise SystemExit(3)")
    with pytest.raises(ProgramFailed) as caught:
        measure("import time; time.sleep(60)", timeout_seconds=0.3)
    assert caught.value.reason.endswith(": it did not end within 0.3 s")
    with pytest.raises(ProgramFailed, match="no-such-program"):
        meter.run(["no-such-program"], timeout_seconds=5, environment=os.environ)


def test_a_program_does_not_outlive_the_process_that_measures_it(tmp_path):
    note = tmp_path / "pid"
    script = (
        f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    order = json.dumps([[sys.executable, "-c", script], dict(os.environ), 60])
    command = [sys.executable, "-m", "fixtures.bench.meter"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT, text=True)
    assert process.stdin is not None
    process.stdin.write(order)
    process.stdin.close()
    wait_for(lambda: note.exists() and note.read_text())
    process.kill()
    process.wait(60)
    wait_for(lambda: not Path("/proc", note.read_text()).exists())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_output_is_returned():
    assert measure("print('hello')").output == "hello\n"


def test_a_ratio_is_taken_in_each_round_beside_the_best_of_the_others():
    ours = [sample(1.0), sample(10.0), sample(1.0)]
    ratio = results.speed_ratio(
        ours, [sample(2.0), sample(20.0), sample(9.0)], [sample(9.0), sample(9.0), sample(3)]
    )
    assert (ratio.median, ratio.least, ratio.most) == pytest.approx((2.0, 0.9, 3.0))


def test_what_fails_is_left_out_and_the_rest_goes_on():
    def fail() -> Sample:
        raise ProgramFailed("it is not installed")

    contest = Contest("full")
    contest.run(2, {"one": lambda: sample(1.0), "other": fail}, lambda _line: None)
    assert len(contest.samples["one"]) == 2
    assert contest.skipped == {"other": "it is not installed"}
    assert Contest.from_json(json.loads(json.dumps(contest.to_json()))) == contest


def test_the_quantiles_of_writes_are_those_of_their_bins():
    counts = [0] * 71
    counts[20], counts[30] = 98, 2  # below 1 ms, below 10 ms
    writes = Writes(tuple(counts))
    assert 0.79 < writes.milliseconds(0.5) < 1.0
    assert 7.9 < writes.milliseconds(0.99) < 10.0
    assert Writes((0,) * 71).milliseconds(0.5) == 0.0


@pytest.mark.parametrize(
    ("clusters", "expected"),
    [
        ([1, 2, 3, 9], [(1, 3), (9, 1)]),
        (range(20), [(0, 16), (16, 4)]),
        ([0, 2, 4], [(0, 1), (2, 1), (4, 1)]),
    ],
)
def test_clusters_are_written_in_runs_of_a_mebibyte_at_most(clusters, expected):
    assert list(source.runs(np.array(clusters, np.uint64))) == expected


def test_a_bitmap_has_the_wanted_part_of_its_bits_set(tmp_path):
    image = tmp_path / "disk.qcow2"
    bitmaps.create(image, 64 << 30, 0.1)
    with image.open("rb") as file:
        found = bitmaps.clusters_of_bitmap(file)
    assert len(found) == 2
    content = np.frombuffer(image.read_bytes()[found[1] :][: bitmaps.CLUSTER], np.uint8)
    assert np.unpackbits(content).mean() == pytest.approx(0.1, abs=0.01)


def test_a_ratio_that_has_halved_is_found_whichever_way_is_better():
    kept = {"full": 1.0, "full-cpu-convert": 1.0, "full-cpu": 1.0}
    assert quick.worse(kept, {"full": 0.51, "full-cpu-convert": 1.9, "full-cpu": 9.0}) == []
    assert quick.worse(kept, {"full": 0.49, "full-cpu-convert": 1.9}) == ["full"]
    assert quick.worse(kept, {"full": 3.0, "full-cpu-convert": 2.1}) == ["full-cpu-convert"]
    assert quick.worse(kept, {"full": 3.0}) == ["full-cpu-convert"]


def test_a_chart_is_svg_with_a_bar_for_each_entry():
    bars = [plot.Bar("a < b", 10.0, 8.0, 12.0), plot.Bar("ours", 5.0, second=2.0, ours=True)]
    tree = ET.fromstring(plot.chart("Speed & more", "MiB/s", bars))
    assert len(tree.findall("{*}rect")) == 3
    widths = [float(bar.attrib["width"]) for bar in tree.findall("{*}rect")]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)


def test_every_figure_has_a_key_of_its_own_and_is_computed_from_its_contest():
    keys = [figure.key for figure in figures.FIGURES]
    assert sorted(keys) == sorted(set(keys))
    contest = Contest("full", {"backupctl": [sample(2.0, cpu_seconds=1.0)], "dd, direct I/O": [sample(1.0)]})
    found = figures.compute({"full": contest})
    assert found["full-limit"].median == pytest.approx(0.5)
    assert found["full-cpu"].median == pytest.approx(1.0)
    assert "full" not in found


def test_the_page_is_what_the_kept_results_give():
    kept = json.loads((ROOT / "docs/performance.json").read_text())
    for name, content in report.pages(kept["bench"]).items():
        assert (ROOT / "docs" / name).read_text() == content, f"{name}: run `python -m fixtures.bench.report`"


def test_what_more_disks_can_bring_at_most_is_told_by_the_cores_that_one_keeps_busy():
    contest = Contest("full of several disks")
    contest.samples["1 disk"] = [sample(1.0, cpu_seconds=0.5, source_cpu_seconds=0.75)]
    said = " ".join(report.bounds({"disks": contest}, cores=2))
    assert "keep so many of the 2 cores busy: 1 disk 1.25." in said
    assert "more disks can be 1.60 times as fast as one at most" in said
