# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl report`: which VMs are on the page, what is remembered of them, and how it ends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from backupctl.cli import configuration, metrics, report
from backupctl.cli.main import cli
from backupctl.cli.target import Target
from backupctl.errors import UsageError
from backupctl.names import PointId
from backupctl.repository import activity
from backupctl.repository.activity import Activity
from tests.unit.points import P1, P2, P3, disk_entry


@pytest.fixture
def place(two_points, tmp_path) -> Path:
    """A repository with two points of vm1, and a configuration in which a second VM has none."""
    configuration = (
        f'[defaults]\nrepository = "{two_points[0].repository.path}"\nkeep_last = 1\nmax_age = "999y"\n'
        f'[metrics]\nstate = "{tmp_path / "state"}"\n'
        '[vm.vm1]\nqmp = "unix:/run/vm1"\n[vm.new]\nqmp = "unix:/run/new"\n'
    )
    (tmp_path / "backupctl.toml").write_text(configuration)
    (tmp_path / "backupctl.toml").chmod(0o600)
    return tmp_path


def working(point: PointId) -> Activity:
    now = activity.stamp(datetime.now(UTC))
    return Activity("full", os.getpid(), "copy", point, now, now)


def call(place: Path, *arguments: str, code: int = 0) -> str:
    base = ["report", "--config", str(place / "backupctl.toml"), "--html", str(place / "r.html")]
    done = CliRunner().invoke(cli, [*base, *arguments])
    assert getattr(done.exception, "exit_code", done.exit_code) == code, done.output
    return done.stdout


def document(place: Path, *arguments: str, code: int = 0) -> dict:
    return json.loads(call(place, "--json", *arguments, code=code))


def test_all_configured_vms_are_on_the_page_also_those_without_a_point(place):
    found = document(place)
    (one,) = found["repositories"]
    assert [(vm["vm"], vm["state"], vm["points"]) for vm in one["vms"]] == [
        ("new", "CRITICAL", 0),
        ("vm1", "OK", 2),
    ]
    assert found["bytes"] == (place / "r.html").stat().st_size
    assert one["vms"][1]["next_prune_drops"] == [P1]


def test_only_the_vms_that_are_named_are_on_the_page(place):
    (one,) = document(place, "vm1")["repositories"]
    assert [vm["vm"] for vm in one["vms"]] == ["vm1"]


def remembered(place: Path, builder, **record: object) -> None:
    """Write down the last verify of vm1."""
    (place / "state").mkdir()
    last = {"command": "verify", "ended": 1.8e9, "seconds": 5, "exit_code": 0, **record}
    memory = {"repository": str(builder.repository.path), "verify": {"last": last}}
    (place / "state" / "vm1.json").write_text(json.dumps(memory))


def test_what_is_remembered_of_the_last_commands_is_shown(place, two_points):
    remembered(place, two_points[0], exit_code=4, reason="DamageFound")
    (vm,) = document(place, "vm1")["repositories"][0]["vms"]
    assert vm["state"] == "CRITICAL"
    assert "failed (DamageFound)" in (place / "r.html").read_text()


def test_a_time_that_is_not_one_is_not_shown(place, two_points):
    remembered(place, two_points[0], ended=1e300)
    call(place, "vm1")
    assert "none is known" in (place / "r.html").read_text()


def test_damage_is_on_the_page_and_in_the_exit_code(place, two_points):
    (two_points[0].directory.path / P2 / "manifest.json").write_text("{}")
    (vm,) = document(place, "vm1", code=4)["repositories"][0]["vms"]
    assert (vm["points"], vm["damaged"]) == (1, 1)
    assert f"<th scope=row>{P2}" in (place / "r.html").read_text()


def test_a_repository_that_cannot_be_opened_is_on_the_page_and_in_the_exit_code(place):
    with (place / "backupctl.toml").open("a") as file:
        file.write(f'repository = "{place / "missing"}"\n')
    found = document(place, code=2)
    assert [bool(one["problem"]) for one in found["repositories"]] == [False, True]
    assert "Cannot be opened" in (place / "r.html").read_text()


def test_a_report_that_is_not_one_is_refused_before_any_work(place):
    (place / "r.html").write_text("mine")
    assert call(place, code=2) == ""
    assert (place / "r.html").read_text() == "mine"
    call(place, "--force")


def test_a_file_or_a_port_is_asked_for_and_not_both(place):
    for arguments in ([], ["--html", "x.html", "--web", "0"], ["--web", "0", "--metrics", "0"]):
        done = CliRunner().invoke(cli, ["report", "--config", str(place / "backupctl.toml"), *arguments])
        assert isinstance(done.exception, UsageError)


def test_the_page_is_served_on_this_machine_only(place):
    base = ["report", "--config", str(place / "backupctl.toml"), "--web", "192.0.2.1:80"]
    done = CliRunner().invoke(cli, base)
    assert "refusing to listen" in done.exception.message
    assert "NBD" not in done.exception.message + done.exception.hint


def test_a_served_page_shows_a_run_as_it_works_and_ends_when_asked(place, two_points):
    command = [sys.executable, "-m", "backupctl", "report", "--config", str(place / "backupctl.toml")]
    builder = two_points[0]
    with subprocess.Popen([*command, "--web", "0", "--json"], stdout=subprocess.PIPE, text=True) as server:
        try:
            address = json.loads("".join(itertools.islice(server.stdout, 3)))["uri"]

            def ask(name: str = "") -> str:
                with urllib.request.urlopen(address + name, timeout=60) as answer:
                    return answer.read().decode()

            assert P2 in ask()
            before = json.loads(ask("live.json"))
            assert {one["doing"] for one in before["vms"]} == {""}
            with builder.directory.lock() as lock:
                activity.write(lock, working(P3))
                doing = {one["vm"]: one["doing"] for one in json.loads(ask("live.json"))["vms"]}
                assert f"full to {P3}" in doing["vm1"]
                assert doing["new"] == ""
            builder.point(P3, (disk_entry(), []))
            assert json.loads(ask("live.json"))["version"] != before["version"]
            assert P3 in ask()
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0


@pytest.mark.parametrize(("most", "maps"), [(4, 1), (3, 0)])  # for two VMs: two rows of each, or one of each
def test_of_very_many_vms_the_page_has_no_maps_of_one_point_each(place, monkeypatch, most, maps):
    monkeypatch.setattr(report, "_PAGE_MAPS", most)
    call(place)
    assert (place / "r.html").read_text().count("The map of") == 2 * maps


def test_metrics_are_served_of_every_vm_until_asked_to_stop(place, two_points):
    command = [sys.executable, "-m", "backupctl", "report", "--config", str(place / "backupctl.toml")]
    remembered(place, two_points[0])
    path = two_points[0].repository.path
    with subprocess.Popen(
        [*command, "--metrics", "0", "--json"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            address = json.loads("".join(itertools.islice(server.stdout, 3)))["uri"]
            with urllib.request.urlopen(address, timeout=60) as answer:
                lines = answer.read().decode().splitlines()
            assert f'backupctl_points{{vm="vm1",repository="{path}"}} 2' in lines
            assert f'backupctl_points{{vm="new",repository="{path}"}} 0' in lines
            assert f'backupctl_last_verify_success{{vm="vm1",repository="{path}"}} 1' in lines
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0


def test_of_a_repository_that_cannot_be_opened_there_are_metrics_of_what_is_remembered(place, two_points):
    remembered(place, two_points[0])
    path = two_points[0].repository.path
    target = Target(configuration.load(str(place / "backupctl.toml")), None, path, typed_repository=False)
    (path / "repository.json").unlink()
    found = metrics.text(target)
    assert f'backupctl_last_verify_success{{vm="vm1",repository="{path}"}} 1' in found
    assert "backupctl_points" not in found


@pytest.mark.parametrize("port", ["192.0.2.1:80", "0.0.0.0:80", "[::]:80"])
def test_metrics_are_served_on_this_machine_only(place, port):
    done = CliRunner().invoke(cli, ["report", "--config", str(place / "backupctl.toml"), "--metrics", port])
    assert "refusing to listen" in done.exception.message
    assert "NBD" not in done.exception.message + done.exception.hint


def test_a_second_report_replaces_the_first(place):
    call(place)
    first = (place / "r.html").stat().st_ino
    call(place)
    assert (place / "r.html").stat().st_ino != first
