# SPDX-License-Identifier: GPL-2.0-or-later
"""`doctor --report`: it has what a report of a problem needs, and none of the secrets that are all around."""

import json
import os
import tarfile

import pytest

from backupctl.cli import crash_log, main
from backupctl.repository.repository import Repository
from tests.unit.points import P1, P2, Builder, disk_entry

SECRETS = {
    "webhook": "T0p-webhook-7c2",
    "ntfy": "T0p-ntfy-topic-9",
    "healthchecks": "6b0c5d9e-1111-2222-3333-444455556666",
    "vm webhook": "T0p-of-vm-4f1",
    "hook": "T0p-hook-password",
    "argument": "T0p-argument",
    "mail": "admin-of-it@example.org",
    "in a log": "T0p-in-a-log",
    "command in the guest": "mysql -pT0p-in-the-guest",
    "comment": "T0p-in-a-comment",
}


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """A configuration, a log and a repository; secrets wherever there can be any."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(tmp_path / "backupctl.toml"))
    monkeypatch.chdir(tmp_path)
    builder = Builder(Repository.create(tmp_path / "repository"))
    for point, content in ((P1, b"content of a disk"), (P2, b"more")):
        builder.point(point, (disk_entry(), [(0, content)]))
    (tmp_path / "backupctl.toml").write_text(
        f"""
# the password is {SECRETS["comment"]}
[defaults]
repository = "{tmp_path}/repository"
keep_daily = 14
restore_test_command = "{SECRETS["command in the guest"]}"
[notify]
webhook = "https://hooks.example/services/{SECRETS["webhook"]}"
ntfy = "https://ntfy.example/{SECRETS["ntfy"]}"
healthchecks = "https://hc.example/{SECRETS["healthchecks"]}"
mail = "{SECRETS["mail"]}"
[hooks]
before = ["/bin/true", "--password={SECRETS["hook"]}", "{SECRETS["argument"]}"]
[vm.vm1]
qmp = "unix:{tmp_path}/no.qmp"
[vm.vm1.notify]
webhook = "https://hooks.example/{SECRETS["vm webhook"]}"
"""
    )
    log = crash_log.write(
        [
            f'debug {{"execute": "x", "arguments": {{"password": "{SECRETS["in a log"]}"}}}}',
            f"the hook printed {SECRETS['hook']} and {SECRETS['argument']}",
            f"cannot reach https://ntfy.example/{SECRETS['ntfy']}, tell {SECRETS['mail']}",
            "the monitor did not answer",
        ]
    )
    assert log
    return tmp_path


def call(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["backupctl", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(ended.value.code)


def contents(path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            one.name.removeprefix("backupctl-report/"): archive.extractfile(one).read().decode()
            for one in archive.getmembers()
        }


def test_the_report_has_what_is_needed_and_no_secret(surroundings, monkeypatch, capsys):
    path = surroundings / "report.tar.gz"
    assert call(monkeypatch, "doctor", "vm1", "--report", str(path)) == 1  # there is no VM
    found = contents(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [name for name in SECRETS if any(SECRETS[name] in text for text in found.values())] == []
    assert "content of a disk" not in "".join(found.values())

    assert "the monitor did not answer" in next(text for name, text in found.items() if "logs/" in name)
    settings = json.loads(found["configuration.json"])["content"]
    assert settings["defaults"]["keep_daily"] == 14
    assert settings["hooks"]["before"] == ["/bin/true", "***", "***"]
    points = json.loads(found["points.json"])
    assert [one["point"] for one in points["points"]] == [P1, P2]
    assert "digests" not in points["points"][0]["disks"][0]
    assert json.loads(found["doctor.json"])["vm"] == "vm1"
    assert json.loads(found["versions.json"])["components"][0]["name"] == "backupctl"
    shown = capsys.readouterr().out
    assert "Read it before you send it" in shown
    assert all(name in shown for name in found)


def test_nothing_is_overwritten_and_no_link_is_followed(surroundings, monkeypatch, capsys):
    path = surroundings / "report.tar.gz"
    path.symlink_to(surroundings / "elsewhere")
    assert call(monkeypatch, "doctor", "vm1", "--report", str(path)) == 2
    assert "exists already" in capsys.readouterr().err
    assert not (surroundings / "elsewhere").exists()
    assert [one.name for one in surroundings.glob(".report*")] == []


def test_a_file_that_cannot_be_written_is_an_error(surroundings, monkeypatch, capsys):
    assert call(monkeypatch, "doctor", "vm1", "--report", str(surroundings / "none/report.tar.gz")) == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_report_is_in_the_document_for_programs(surroundings, monkeypatch, capsys):
    path = surroundings / "report.tar.gz"
    call(monkeypatch, "doctor", "vm1", "--json", "--report", str(path))
    assert json.loads(capsys.readouterr().out)["report"] == str(path)


def test_one_report_is_about_one_vm(surroundings, monkeypatch, capsys):
    assert call(monkeypatch, "doctor", "--all", "--report", str(surroundings / "r.tar.gz")) == 2
    assert "--report is about one VM" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a hard link", "a symbolic link", "a pipe", "no log of ours"])
def test_what_somebody_put_beside_the_logs_is_not_in_the_report(surroundings, monkeypatch, kind):
    """Else a user who may write to /tmp could have root send a file of root's."""
    private = surroundings / "private"
    private.write_text("backupctl keeps a secret here")
    path = surroundings / "tmp/backupctl-error-x.log"
    if kind == "a hard link":
        path.hardlink_to(private)
    elif kind == "a symbolic link":
        path.symlink_to(private)
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.write_text("keeps a secret here")
    assert crash_log.read(path) is None
    call(monkeypatch, "doctor", "vm1", "--report", str(surroundings / "report.tar.gz"))
    assert "keeps a secret" not in "".join(contents(surroundings / "report.tar.gz").values())


def test_a_repository_that_cannot_be_read_does_not_keep_the_report_from_being_written(
    surroundings, monkeypatch
):
    (surroundings / "repository/repository.json").write_text("{")
    path = surroundings / "report.tar.gz"
    assert call(monkeypatch, "doctor", "vm1", "--report", str(path)) == 1
    assert json.loads(contents(path)["points.json"])["error"]["kind"]
