# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM, several, patterns, all: each command takes them, and one VM's failure does not stop the others."""

import json
import signal

import pytest
from click.testing import CliRunner

from backupctl.cli import backup, main
from backupctl.cli.main import cli
from backupctl.cli.selection import Selection
from backupctl.errors import (
    WORST_FIRST,
    Failed,
    Interrupted,
    InvalidName,
    Locked,
    MonitorUnreachable,
    NeedsRecovery,
    UsageError,
)
from backupctl.names import VmName
from backupctl.operations import status
from backupctl.repository.repository import Repository
from tests.unit.cli.test_all_vms import Points
from tests.unit.cli.test_command_line import every_error
from tests.unit.points import P1, P2

KNOWN = ("web1", "web2", "db")


@pytest.mark.parametrize(
    ("words", "everything", "found"),
    [
        (("db", "web1", "db"), False, ("db", "web1")),
        (("web*",), False, ("web1", "web2")),
        (("d?", "web[2-9]"), False, ("db", "web2")),
        ((), True, KNOWN),
        (("other",), False, ("other",)),
    ],
)
def test_names_patterns_and_all(words, everything, found):
    assert Selection(words, everything).of(KNOWN) == found


def test_only_a_single_plain_name_is_one():
    assert Selection(("web1",)).one == "web1"
    for several in (Selection(("web1", "db")), Selection(("db*",)), Selection((), True), Selection()):
        assert several.one is None
    with pytest.raises(InvalidName):
        _ = Selection(("../x",)).one


@pytest.mark.parametrize("wrong", [Selection(("nothing*",)), Selection(("web1",), True)])
def test_a_pattern_without_a_match_and_a_name_beside_all_are_wrong_use(wrong):
    with pytest.raises(UsageError):
        wrong.of(KNOWN)


def test_every_exit_code_has_its_place_among_the_worst():
    assert {kind.exit_code for kind in every_error()} | {0} == set(WORST_FIRST)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three VMs, whose runs end as they are told: `runs({"web": Failed("…")})`; returns what was called."""
    config = tmp_path / "c.toml"
    config.write_text(
        f'[defaults]\nrepository = "{tmp_path}/r"\n[vm.web]\nqmp = "/q1"\nlimit = "1M"\n'
        '[vm.db]\nqmp = "/q2"\nlimit = "2M"\n[vm.shop]\nqmp = "/q3"\n'
    )
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(config))
    Repository.create(tmp_path / "r")
    called: dict[str, int | None] = {}

    def prepare(ends: dict[str, Exception]):
        def run(ctx):
            called[ctx.vm.name] = ctx.options.limit_bytes_per_second
            raise ends[ctx.vm.name]

        monkeypatch.setattr(backup.backup, "run", run)
        return called

    return prepare


def ended(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["backupctl", *arguments])
    with pytest.raises(SystemExit) as caught:
        main.main()
    seen = capsys.readouterr()
    return int(caught.value.code or 0), seen.out, seen.err


def test_each_vm_has_its_own_configuration_and_the_worst_error_decides(runs, monkeypatch, capsys):
    called = runs(
        {"web": Failed("full disk"), "db": NeedsRecovery("left over"), "shop": MonitorUnreachable("off")}
    )
    code, out, err = ended("incremental", "--all", "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert called == {"web": 1 << 20, "db": 2 << 20, "shop": None}
    assert code == 3
    document = json.loads(out)
    assert [(one["vm"], one["exit_code"]) for one in document["vms"]] == [("web", 1), ("db", 3), ("shop", 1)]
    assert document["vms"][1]["error"]["next"] == "backupctl recover db"
    assert "backupctl: web: full disk" in err
    assert "backupctl: 3 of 3 VMs failed: web, db, shop" in err


def test_what_is_typed_is_for_each_of_them(runs, monkeypatch, capsys, tmp_path):
    called = runs({"web": Failed("x"), "db": Failed("y")})
    log = tmp_path / "log"
    words = ("full", "web", "db", "--limit", "3M", "--log-file", str(log))
    assert ended(*words, monkeypatch=monkeypatch, capsys=capsys)[0] == 1
    assert called == {"web": 3 << 20, "db": 3 << 20}
    assert log.exists()


def test_a_run_that_was_asked_to_end_is_the_last(runs, monkeypatch, capsys):
    called = runs({"web": Interrupted("stopped by SIGTERM"), "db": Locked("busy")})
    code, _, err = ended("full", "web", "db", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, list(called)) == (1, ["web"])
    assert signal.SIGTERM.name in err


@pytest.mark.parametrize(
    "words",
    [
        ("full",),
        ("full", "web", "wbe"),
        ("full", "--all", "--qmp", "/q"),
        ("full", "web", "db", "--disk", "vda"),
        ("incremental", "web*", "--since", "latest"),
        ("status", "x*"),
        ("doctor", "web", "--all"),
    ],
)
def test_what_can_not_be_meant_is_refused_before_anything_is_done(runs, monkeypatch, capsys, words):
    called = runs({"web": Failed("x")})
    assert ended(*words, monkeypatch=monkeypatch, capsys=capsys)[0] == 2
    assert called == {}


def test_status_of_several_is_one_document(runs, monkeypatch, capsys):
    found = status.Status(VmName("web"), (), (), None, "off", (), (), "cannot reach the VM")
    monkeypatch.setattr(status, "look", lambda *_: found)
    code, out, _ = ended("status", "web", "shop", "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, [one["vm"] for one in json.loads(out)["vms"]]) == (0, ["web", "shop"])
    assert json.loads(out)["vms"][0]["report"]["problem"] == "off"


def test_one_that_matches_a_pattern_is_told_as_several_are(runs, monkeypatch, capsys):
    """Else the form of the document would depend on what is configured."""
    runs({"web": Failed("x")})
    out = ended("full", "we*", "--json", monkeypatch=monkeypatch, capsys=capsys)[1]
    assert [one["vm"] for one in json.loads(out)["vms"]] == ["web"]


@pytest.fixture
def points(tmp_path, monkeypatch):
    """Points of web, db and old, which is not configured, in two repositories."""
    first, second = Repository.create(tmp_path / "r1"), Repository.create(tmp_path / "r2")
    Points(first).add(P1, P2)
    Points(second, "db").add(P1)
    Points(second, "old").add(P2)
    config = tmp_path / "c.toml"
    config.write_text(
        f'[defaults]\nrepository = "{first.path}"\nkeep_last = 1\n[vm.web]\nqmp = "/q1"\n'
        f'[vm.db]\nqmp = "/q2"\nrepository = "{second.path}"\n'
    )
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(config))


def listed(*words: str) -> list[tuple[str, str]]:
    done = CliRunner().invoke(cli, ["list", *words, "--json"], catch_exceptions=False)
    return [(one["vm"], one["point"]) for one in json.loads(done.stdout)]


def test_list_takes_names_patterns_and_all(points):
    everything = [("web", P1), ("web", P2), ("db", P1), ("old", P2)]
    assert listed() == listed("--all") == listed("*") == everything
    assert listed("db", "web") == [("db", P1), ("web", P1), ("web", P2)]
    assert listed("[do]*") == [("db", P1), ("old", P2)]


def test_verify_and_prune_take_names_and_patterns(points):
    done = CliRunner().invoke(cli, ["verify", "o*", "web", "--fast", "--json"])  # images of nothing
    assert json.loads(done.stdout)["vms"] == ["old", "web"]
    done = CliRunner().invoke(cli, ["verify", "web", P2, "--fast", "--json"])
    assert (json.loads(done.stdout)["vms"], json.loads(done.stdout)["points"]) == (["web"], 1)
    done = CliRunner().invoke(cli, ["prune", "w*", "db", "--dry-run", "--json"])
    assert [one["vm"] for one in json.loads(done.stdout)["vms"]] == ["web", "db"]
