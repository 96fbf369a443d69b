# SPDX-License-Identifier: GPL-2.0-or-later
"""What the doctor finds in a VM."""

import pytest

from tests.conftest import MIB


def verdicts(told: dict, subject: str) -> list[str]:
    """Return the verdicts on a subject."""
    return [one["verdict"] for one in told["findings"] if one["subject"] == subject]


@pytest.mark.simulator_too
def test_a_vm_that_can_be_backed_up_has_nothing_bad_and_nothing_is_changed(any_build, make_lab):
    lab = make_lab(any_build, {"vda": 8 * MIB})
    told = lab.cli.json("doctor", "web")
    assert told["ok"]
    assert {one["subject"] for one in told["findings"]} == {
        *(
            "configuration",
            "tools",
            "repository",
            "directories",
            "monitor",
            "disks",
            "file system",
            "scratch",
            "agent",
        )
    }
    assert not lab.cli.repository.exists()
    lab.writer.write(5)
    point = lab.backup("full")["point"]
    before = {path: path.stat().st_mtime_ns for path in lab.cli.repository.rglob("*")}
    told = lab.cli.json("doctor", "web")
    # The lab's QEMU may lie in somebody's home.
    assert {one["verdict"] for one in told["findings"] if one["subject"] != "configuration"} == {"ok"}
    assert point in told["findings"][-1]["said"]
    assert {path: path.stat().st_mtime_ns for path in lab.cli.repository.rglob("*")} == before
    lab.assert_at_rest()
    lab.agent.frozen = True
    assert verdicts(lab.cli.json("doctor", "web", code=1), "agent") == ["bad"]
    lab.agent.frozen = False


def test_what_would_make_a_run_fail_is_bad_and_what_may_surprise_a_warning(oldest_build, make_lab, tmp_path):
    lab = make_lab(oldest_build, {"vda": 8 * MIB, "vdb": 8 * MIB}, formats={"vdb": "raw"})
    lab.agent.behaviour["guest-fsfreeze-status"] = "refuse"
    told = lab.cli.json("doctor", "web")
    assert verdicts(told, "agent") == ["warning"]
    assert verdicts(told, "disks") == ["ok", "warning"]
    strict = tmp_path / "strict.toml"
    strict.write_text('[defaults]\nfreeze = "require"\nscratch_size = "1M"\nview = "snapshot-access"\n')
    lab.cli.environment["BACKUPCTL_CONFIG"] = str(strict)
    told = lab.cli.json("doctor", "web", code=1)
    for subject in ("agent", "scratch", "view"):
        assert verdicts(told, subject) == ["bad"], subject
    assert lab.backup("full", code=1)["error"]["next"].startswith("backupctl doctor web --qmp ")


def test_what_a_restore_test_needs_is_looked_for_where_run_is_to_do_one(any_build, make_lab, tmp_path):
    lab = make_lab(any_build, {"vda": MIB})
    lab.backup("full")
    config = tmp_path / "restore-test.toml"
    lab.cli.environment |= {"BACKUPCTL_CONFIG": str(config), "QEMU_SYSTEM": "/no/such/qemu"}

    def told(policy: str) -> list[str]:
        config.write_text(f"[vm.web]\n{policy}")
        config.chmod(0o600)
        found = lab.cli.json("doctor", "web")["findings"]
        return [one["verdict"] for one in found if one["subject"] == "restore test"]

    assert told("") == []
    assert told('restore_test = "weekly"') == ["warning"]
