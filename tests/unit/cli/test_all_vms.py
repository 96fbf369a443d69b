# SPDX-License-Identifier: GPL-2.0-or-later
"""Without a NAME: every VM of every configured repository. And whose rules a prune obeys."""

import json
import shutil
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from backupctl.cli.main import cli
from backupctl.errors import DamageFound, UsageError
from backupctl.names import VmName
from backupctl.repository.repository import Repository
from backupctl.repository.vm_directory import VmDirectory
from tests.unit.points import P1, P2, P3, Builder, disk_entry


@dataclass
class Points(Builder):
    """Points of one VM, whose images are empty files: nobody here reads them."""

    name: str = "web"

    @property
    def directory(self) -> VmDirectory:
        return self.repository.vm(VmName(self.name))

    def add(self, *points: str) -> None:
        for point in points:
            partial = self.begin(point)
            for end in ("qcow2", "digests"):
                (partial.path / f"vda.{end}").touch()
            partial.commit(self.manifest(point))


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two VMs with a repository each, web with three points and db with two; `shop` has none yet."""
    first, second = Repository.create(tmp_path / "r1"), Repository.create(tmp_path / "r2")
    Points(first).add(P1, P2, P3)
    Points(second, "db").add(P1, P2)
    config = tmp_path / "backupctl.toml"
    config.write_text(
        f'[defaults]\nrepository = "{first.path}"\n'
        '[vm.web]\nqmp = "/q1"\nkeep_last = 2\nkeep_yearly = 1\n'
        f'[vm.db]\nqmp = "/q2"\nrepository = "{second.path}"\n'
        '[vm.shop]\nqmp = "/q3"\nkeep_last = 1\n'
    )
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(config))
    return first, second


def call(*arguments: str, error: type[Exception] | None = None):
    """Call it; returns its document and what it told."""
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    if error is None:
        assert done.exit_code == 0, (done.output, done.exception)
    else:
        assert isinstance(done.exception, error), (done.output, done.exception)
    return json.loads(done.stdout) if done.stdout else None, done.stderr, done.exception


def test_list_tells_of_all_repositories(two):
    told, _, _ = call("list")
    assert [(one["vm"], one["point"]) for one in told] == [
        *(("web", point) for point in (P1, P2, P3)),
        *(("db", point) for point in (P1, P2)),
    ]
    text = CliRunner().invoke(cli, ["list"]).output
    assert [line for line in text.splitlines() if line.endswith(":")] == [f"{one.path}:" for one in two]
    alone = CliRunner().invoke(cli, ["list", "--repository", str(two[1].path)]).output
    assert not any(line.endswith(":") for line in alone.splitlines())


def test_what_can_not_be_listed_hides_nothing_else(two):
    """A file system that is not mounted, most likely: so it is no success either."""
    (two[0].path / "repository.json").unlink()
    told, _, err = call("list", error=UsageError)
    assert [one["vm"] for one in told] == ["db", "db"]
    assert f"{two[0].path} is not a backupctl repository" in err.message
    (two[1].path / "db" / P1 / "manifest.json").write_text("{")
    told, _, err = call("list", error=DamageFound)
    assert [one["point"] for one in told] == [P2]
    assert str(two[0].path) in err.message
    for one in two:
        (one.path / "repository.json").unlink(missing_ok=True)
    told, _, err = call("list", error=UsageError)
    assert told is None
    assert all(str(one.path) in err.message for one in two)


def test_verify_is_one_document_of_all_repositories(two):
    told, _, err = call("verify", "--fast", error=DamageFound)  # images of nothing
    assert (told["vms"], told["points"]) == (["web", "db"], 5)
    assert {one["vm"] for one in told["damage"]} == {"web", "db"}
    assert all(str(one.path) in err.message for one in two)
    assert sorted(call("verify", "db", "--fast", error=DamageFound)[0]) == sorted(told)


def test_a_repository_that_is_missing_is_told_after_the_others_were_verified(tmp_path, two):
    builder = Builder(Repository.create(tmp_path / "r3"))
    builder.point(P1, (disk_entry(), [(0, b"x")]))
    (tmp_path / "backupctl.toml").write_text(
        f'[vm.vm1]\nrepository = "{tmp_path}/r3"\n[vm.gone]\nrepository = "{tmp_path}/gone"\n'
    )
    told, _, err = call("verify", error=UsageError)
    assert (told["vms"], told["damage"]) == (["vm1"], [])
    assert "gone is not a backupctl repository" in err.message
    assert err.next_command == "backupctl full gone"


def test_prune_goes_by_each_vms_own_rules_and_says_whom_it_left_alone(two):
    told, said, _ = call("prune", "--dry-run")
    (web,) = told["vms"]
    assert web["rules"] == {"keep_last": 2, "keep_yearly": 1}
    assert [one["keep"] for one in web["points"]] == [False, True, True]
    skipped = {one["vm"]: one["reason"] for one in told["skipped"]}
    assert "no retention rule" in skipped["db"]
    assert "no recovery points yet" in skipped["shop"]
    assert "skipped db: no retention rule is configured" in said
    assert not (two[0].path / "shop").exists()


def test_a_verify_of_all_names_the_vms_that_have_no_backup(two):
    told, said, _ = call("verify", "--fast", "--quiet", error=DamageFound)  # their images are empty files
    assert told["points"] == 5
    assert f"warning: there is no recovery point of shop in {two[0].path}" in said
    assert "point of web" not in said
    assert "point of db" not in said
    typed = ("--repository", str(two[1].path))
    assert "no recovery point" not in call("verify", "--fast", *typed, error=DamageFound)[1]
    shutil.rmtree(two[1].path / "db")
    done = CliRunner().invoke(cli, ["verify", *typed])
    assert (done.exit_code, done.stdout.endswith(": nothing to verify\n")) == (0, True)


def test_rules_of_the_command_line_are_for_all(two):
    told, _, _ = call("prune", "--dry-run", "--keep-last", "1")
    assert {one["vm"]: len([p for p in one["points"] if p["keep"]]) for one in told["vms"]} == {
        "web": 1,
        "db": 1,
    }


def test_a_vm_that_is_not_configured_is_pruned_by_name_or_rule_only(two, tmp_path):
    """The rules of [defaults] are not for what lies there from long ago."""
    config = tmp_path / "backupctl.toml"
    config.write_text('[defaults]\nkeep_last = 1\n[vm.web]\nqmp = "/q1"\n')
    Points(two[0], "old").add(P1, P2)
    there = ("--repository", str(two[0].path), "--dry-run")
    told, _, _ = call("prune", *there)
    assert [one["vm"] for one in told["vms"]] == ["web"]
    assert told["skipped"] == [{"vm": "old", "reason": "it is not configured"}]
    assert [one["vm"] for one in call("prune", *there, "--keep-last", "1")[0]["vms"]] == ["old", "web"]
    assert call("prune", "old", *there)[0]["vm"] == "old"


def test_what_can_not_be_pruned_holds_up_nobody_else(two):
    (two[0].path / "web" / P1 / "manifest.json").write_text("{")
    told, _, _ = call("prune", "--dry-run", "--keep-last", "1", error=DamageFound)
    assert [one["vm"] for one in told["vms"]] == ["db"]
    assert [(one["vm"], one["error"]["kind"]) for one in told["failed"]] == [("web", "DamageFound")]


def test_no_rule_for_anybody_is_wrong_use(two, tmp_path):
    (tmp_path / "backupctl.toml").write_text('[vm.web]\nrepository = "/r"\n[vm.db]\nrepository = "/r"\n')
    _, _, err = call("prune", error=UsageError)
    assert "no retention rule" in err.message
    (tmp_path / "backupctl.toml").write_text("")
    assert "no VM is configured" in call("prune", error=UsageError)[2].message


def test_the_command_lines_rules_are_the_whole_policy_and_the_unused_ones_are_told(two):
    """keep_yearly would hold a point more than was asked for, keep_last one less."""
    told, said, _ = call("prune", "web", "--dry-run", "--keep-last", "1")
    assert [one["keep"] for one in told["points"]] == [False, False, True]
    assert told["rules"] == {"keep_last": 1}
    assert told["unused_rules"] == {"keep_last": 2, "keep_yearly": 1}
    assert "rules not used: keep_last = 2, keep_yearly = 1" in said
    told, said, _ = call("prune", "web", "--dry-run", "--keep-within", "1d", "--keep-last", "2")
    assert told["unused_rules"] == {"keep_yearly": 1}
    told, said, _ = call("prune", "web", "--dry-run")
    assert (told["rules"], told["unused_rules"]) == ({"keep_last": 2, "keep_yearly": 1}, {})
    assert "not used" not in said


def test_a_rule_that_holds_nothing_is_not_replaced_by_the_configurations(two):
    call("prune", "web", "--dry-run", "--keep-last", "0", error=UsageError)
