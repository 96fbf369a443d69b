# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs with hooks, metrics and notices: what others are told, and that the backup does not depend on them."""

import json
import signal
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from fixtures import builds
from tests.conftest import ROOT
from tests.unit.monitoring import exposition_format
from tests.unit.monitoring.listeners import listener, sendmail

SIZES = {"vda": 1 << 20}
SECRET = "s3cr3t-token"


class Site:
    """A lab with a configuration; `hook` writes what it gets to files."""

    def __init__(self, lab, directory: Path) -> None:
        self.lab, self.directory, self.cli = lab, directory, lab.cli
        self.config = directory / "backupctl.toml"
        self.metrics, self.state = directory / "metrics", directory / "state"
        self.metrics.mkdir()
        self.cli.environment["BACKUPCTL_CONFIG"] = str(self.config)
        self.configure("")

    def configure(self, text: str, *, of_vm: str = "") -> None:
        self.config.write_text(
            f'[metrics]\ntextfile = "{self.metrics}"\nstate = "{self.state}"\n{text}\n'
            f'[vm.web]\nrepository = "{self.cli.repository}"\n{of_vm}'
        )

    def hook(self, more: str = "") -> str:
        """Return a command, as the configuration takes it."""
        text = (
            f"cat > {self.directory}/$BACKUPCTL_HOOK.json; env > {self.directory}/$BACKUPCTL_HOOK.env; {more}"
        )
        return json.dumps(["/bin/sh", "-c", text])

    def got(self, hook: str) -> tuple[dict, dict[str, str]]:
        """Return what a hook got, and forget it."""
        document, around = self.directory / f"{hook}.json", self.directory / f"{hook}.env"
        found = dict(line.split("=", 1) for line in around.read_text().splitlines() if "=" in line)
        found = {name: value for name, value in found.items() if name.startswith("BACKUPCTL_")}
        read = json.loads(document.read_text())
        document.unlink()
        around.unlink()
        return read, found

    def ran(self, hook: str) -> bool:
        return (self.directory / f"{hook}.json").exists()

    def values(self) -> dict[str, float]:
        """Return the metrics by their names, without the prefix."""
        text = (self.metrics / "backupctl-web.prom").read_text()
        return {
            name.removeprefix("backupctl_"): one.value for name, one in exposition_format.read(text).items()
        }


@pytest.fixture
def site(make_lab, tmp_path):
    return Site(make_lab(builds.simulator("10.0"), SIZES), tmp_path)


@pytest.fixture
def server():
    with ExitStack() as held:
        yield held.enter_context(listener())


def frozen_asker(site) -> str:
    """Return shell text that asks the agent whether the guest is frozen, and notes the answer."""
    program = site.directory / "ask.py"
    program.write_text(
        "import json, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\ns.settimeout(60)\ns.connect(sys.argv[1])\n"
        's.sendall(b\'{"execute": "guest-fsfreeze-status"}\\n\')\n'
        'print(json.loads(s.makefile().readline())["return"], file=open(sys.argv[2], "a"))\n'
    )
    return f"/usr/bin/python3 {program} {site.lab.machine.agent_path} {site.directory}/frozen"


def test_hooks_run_around_a_backup_and_never_while_the_guest_is_frozen(site):
    hook = site.hook(frozen_asker(site))
    site.configure(f"[hooks]\nbefore = {hook}\nafter = {hook}\nfailed = {hook}\n")
    report = site.lab.backup("full")
    assert report["frozen_ms"] is not None
    document, around = site.got("before")
    assert (document["result"], document["report"], around["BACKUPCTL_RESULT"]) == (
        "started",
        None,
        "started",
    )
    document, around = site.got("after")
    assert document["report"]["point"] == around["BACKUPCTL_POINT"] == report["point"]
    assert document["report"]["disks"] == report["disks"]
    assert around["BACKUPCTL_VM"] == "web"
    assert around["BACKUPCTL_COMMAND"] == "full"
    assert (around["BACKUPCTL_RESULT"], around["BACKUPCTL_EXIT_CODE"]) == ("success", "0")
    assert not site.ran("failed")
    site.lab.machine.control("fault", spec="qmp:transaction=error")
    done = site.cli.run("incremental", "web", code=1)
    assert "backupctl: hook failed" in done.stderr
    document, around = site.got("failed")
    assert document["error"]["kind"] == around["BACKUPCTL_ERROR"] != ""
    assert document["error"]["message"] == around["BACKUPCTL_ERROR_MESSAGE"]
    assert (around["BACKUPCTL_POINT"], around["BACKUPCTL_EXIT_CODE"]) == ("", "1")
    assert not site.ran("after")
    assert (site.directory / "frozen").read_text().split() == ["thawed"] * 4
    site.lab.assert_at_rest()


def test_a_hook_before_that_fails_stops_the_run_before_anything_is_done(site):
    site.configure(f"[hooks]\nbefore = {site.hook('echo no tape; exit 7')}\nfailed = {site.hook()}\n")
    error = site.lab.backup("full", code=1)["error"]
    assert error["kind"] == "HookFailed"
    assert error["message"] == "the hook `before`: /bin/sh failed with exit code 7: no tape"
    assert error["state"] == "nothing was touched"
    assert not site.cli.repository.exists()
    assert site.got("failed")[1]["BACKUPCTL_ERROR"] == "HookFailed"
    assert site.values()["last_run_success"] == 0


@pytest.mark.parametrize("ending", ["exit 9", "sleep 60"])
def test_a_hook_after_that_fails_or_hangs_is_a_warning_and_the_point_stays(site, ending):
    site.configure(f"[hooks]\nafter = {site.hook(f'echo full disk; {ending}')}\ntimeout = 0.5\n")
    report = site.lab.backup("full")
    (warning,) = (one for one in report["warnings"] if one["code"] == "hook-failed")
    assert warning["hook"] == "after"
    assert "full disk" in warning["message"]
    assert site.values()["last_run_success"] == 1
    site.lab.next_is_right()


def test_a_vm_has_hooks_of_its_own(site):
    site.configure(
        f"[hooks]\nbefore = {site.hook('exit 1')}\nafter = {site.hook()}\n",
        of_vm="[vm.web.hooks]\nbefore = []\n",
    )
    site.lab.backup("full")
    assert (site.ran("before"), site.ran("after")) == (False, True)


def test_a_signal_ends_a_hook_before_and_the_run(site):
    site.configure(f"[hooks]\nbefore = {site.hook('sleep 60')}\nfailed = {site.hook()}\n")
    process = site.cli.start("full", "web")
    deadline = time.monotonic() + 60
    while not site.ran("before") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "stopped by SIGTERM" in said
    assert site.got("failed")[1]["BACKUPCTL_ERROR"] == "Interrupted"


def test_metrics_tell_of_success_and_failure_and_keep_the_last_success(site):
    report = site.lab.backup("full")
    first = site.values()
    assert first["last_run_success"] == first["points"] == first["chain_layers"] == 1
    assert first["last_success_stored_bytes"] == sum(one["stored_bytes"] for one in report["disks"])
    assert first["last_success_frozen_seconds"] == report["frozen_ms"] / 1000
    assert abs(first["last_success_timestamp_seconds"] - time.time()) < 600
    site.lab.backup("incremental")
    assert site.values()["chain_layers"] == 2
    socket_path = site.lab.machine.qmp_path
    site.cli.vm[1] = f"unix:{socket_path}.gone"
    site.cli.run("incremental", "web", code=1)
    failed = site.values()
    assert (failed["last_run_success"], failed["last_run_exit_code"], failed["points"]) == (0, 1, 2)
    assert failed["last_success_timestamp_seconds"] >= first["last_success_timestamp_seconds"]
    assert 'reason="MonitorUnreachable"' in (site.metrics / "backupctl-web.prom").read_text()
    site.cli.run("prune", "web", "--keep-last", "5", vm=False)
    assert site.values()["last_prune_success"] == 1
    assert site.values()["last_run_success"] == 0
    (site.cli.repository / "repository.json").rename(site.directory / "away")
    site.cli.run("incremental", "web", code=2)
    assert "points" not in site.values()
    assert site.values()["last_success_timestamp_seconds"] >= first["last_success_timestamp_seconds"]


def test_a_backup_to_another_repository_is_not_taken_for_one_to_the_configured(site):
    site.lab.backup("full")
    before = site.values()
    site.cli.repository = site.directory / "other"
    site.lab.backup("full")
    assert site.values() == before


@pytest.mark.parametrize("broken", ["metrics", "state"])
def test_what_can_not_be_written_is_a_warning(site, broken):
    path = getattr(site, broken)
    if path.exists():
        path.rmdir()
    path.write_text("a file")
    report = site.lab.backup("full")
    assert [one["code"] for one in report["warnings"] if "metrics" in one["code"]] == ["metrics-not-written"]


def test_one_notice_for_a_failure_and_one_for_its_end(site, server):
    program, mails = sendmail(site.directory)
    site.configure(
        f'[notify]\nwebhook = "{server.url}/{SECRET}"\nmail = "root"\nsendmail = "{program}"\n'
        f'healthchecks = "{server.url}/ping"\n'
    )
    site.lab.backup("full")
    assert (server.paths(), mails.exists()) == (["/ping/start", "/ping"], False)
    right, server.seen[:] = site.cli.vm[1], []
    site.cli.vm[1] += ".gone"
    for _ in range(2):
        log = site.directory / "log"
        said = site.cli.run("incremental", "web", "-v", "--log-file", str(log), code=1).stderr
        assert SECRET not in said + log.read_text()
    assert server.paths() == ["/ping/start", f"/{SECRET}", "/ping/fail", "/ping/start", "/ping/fail"]
    body = json.loads(server.seen[1].body)
    assert (body["notice"], body["error"]["kind"]) == ("failure", "MonitorUnreachable")
    assert mails.read_text().count("Subject: ") == 1
    server.seen[:] = []
    site.cli.vm[1] = right
    site.lab.backup("incremental")
    site.lab.backup("incremental")
    bodies = [json.loads(one.body)["notice"] for one in server.seen if one.path == f"/{SECRET}"]
    assert bodies == ["recovery"]
    assert mails.read_text().count("Subject: ") == 2


def test_a_failure_that_reached_nobody_is_told_by_the_next_run(site, server):
    site.configure(f'[notify]\nntfy = "{server.url}/topic"\n')
    site.cli.vm[1] += ".gone"
    site.cli.repository.mkdir()
    for status, noted in ((500, 1), (200, 2), (200, 2)):
        server.status = status
        said = site.cli.run("full", "web", code=1).stderr
        assert ("cannot send the notice by ntfy: the server answered with status 500" in said) == (
            status == 500
        )
        assert len(server.seen) == noted


def test_check_knows_of_the_last_run(site):
    site.lab.backup("full")
    assert site.cli.run("check", "web", vm=False).stdout.startswith("BACKUPCTL OK - web: ")
    site.cli.vm[1] += ".gone"
    site.cli.run("incremental", "web", code=1)
    said = site.cli.run("check", "web", vm=False, code=1).stdout
    assert "failed (MonitorUnreachable)" in said


def test_damage_that_a_verify_found_is_told_until_a_whole_verify_finds_none(site, server):
    site.configure(f'[notify]\nntfy = "{server.url}/topic"\n')
    point = site.lab.backup("full")["point"]
    image = site.cli.repository / "web" / point / "vda.digests"
    whole = image.read_bytes()
    image.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    site.cli.run("verify", "web", "--fast", vm=False, code=4)
    assert site.values()["last_verify_success"] == 0
    assert len(server.seen) == 1
    image.write_bytes(whole)
    site.cli.run("verify", "web", "--fast", vm=False)
    assert site.values()["last_verify_success"] == 0
    assert site.cli.run("check", "web", vm=False, code=2).stdout.startswith(
        "BACKUPCTL CRITICAL - web: the verify"
    )
    site.cli.run("verify", vm=False)
    assert site.values()["last_verify_success"] == 1
    assert [one.headers["Priority"] for one in server.seen] == ["high", "default"]
    site.cli.run("check", "web", vm=False)


def test_a_run_is_surrounded_once_and_each_of_its_tasks_is_remembered(site):
    hook = site.hook()
    site.configure(
        f"[hooks]\nbefore = {hook}\nafter = {hook}\nfailed = {hook}\n",
        of_vm="keep_last = 5\nverify_percent = 100\n",
    )
    site.lab.backup("full")
    (site.directory / "after.json").unlink()
    site.cli.run("run", "web")
    assert site.got("before")[1]["BACKUPCTL_COMMAND"] == "run"
    document, around = site.got("after")
    assert [one["outcome"] for one in document["report"]["tasks"]] == ["done"] * 3
    assert document["point"] == around["BACKUPCTL_POINT"] == document["report"]["tasks"][0]["report"]["point"]
    values = site.values()
    assert values["points"] == 2
    assert [values[f"last_{kind}_success"] for kind in ("run", "prune", "verify")] == [1, 1, 1]
    assert values["last_verify_damage"] == 0
    site.cli.run("run", "web", "--dry-run")
    assert not site.ran("before")
    assert site.values() == values


def test_a_run_whose_repository_is_not_there_is_a_failure_that_is_told(site, server):
    site.configure(
        f'[hooks]\nfailed = {site.hook()}\n[notify]\nwebhook = "{server.url}/hook"\n'
        f'healthchecks = "{server.url}/ping"\n'
    )
    site.cli.run("run", "web", code=2)
    assert site.got("failed")[1]["BACKUPCTL_ERROR"] == "UsageError"
    assert server.paths() == ["/ping/start", "/hook", "/ping/fail"]
    assert site.values()["last_run_exit_code"] == 2


def test_a_hook_before_a_run_may_mount_the_repository(site):
    site.lab.backup("full")
    away = site.directory / "away"
    site.cli.repository.rename(away)
    mount = json.dumps(["/bin/mv", str(away), str(site.cli.repository)])
    site.configure(f"[hooks]\nbefore = {mount}\n")
    site.cli.run("run", "web")
    assert site.values()["points"] == 2


def test_of_several_vms_each_has_its_hooks_and_metrics(site):
    """One of them does not run."""
    site.lab.backup("full")
    machine = site.lab.machine
    site.configure(
        f"[hooks]\nafter = {site.hook()}\nfailed = {site.hook()}\n",
        of_vm=f'qmp = "unix:{machine.qmp_path}"\nagent = "unix:{machine.agent_path}"\n'
        f'scratch = "{site.cli.scratch}"\n'
        f'[vm.db]\nqmp = "unix:{site.directory}/none"\nrepository = "{site.cli.repository}"\n',
    )
    site.cli.run("run", "--all", "--jobs", "2", vm=False, code=1)
    assert site.got("after")[1]["BACKUPCTL_VM"] == "web"
    assert site.got("failed")[1]["BACKUPCTL_VM"] == "db"
    assert sorted(one.name for one in site.metrics.iterdir()) == ["backupctl-db.prom", "backupctl-web.prom"]
    assert site.values()["last_run_success"] == 1


def test_what_is_served_to_prometheus_is_what_the_file_says(site):
    site.lab.backup("full")
    site.cli.run("verify", "web", vm=False)
    command = site.cli.command("report", "web", "--metrics", "0", vm=False)
    with subprocess.Popen(
        command, env=site.cli.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            address = next(line for line in server.stdout if line.startswith("http")).strip()
            with urllib.request.urlopen(address, timeout=60) as answer:
                served = answer.read().decode()
        finally:
            server.terminate()
            assert server.wait(30) == 0
    file = (site.metrics / "backupctl-web.prom").read_text()
    assert "backupctl_points{" in file
    assert without_free_bytes(served) == without_free_bytes(file)


def without_free_bytes(text: str) -> list[str]:
    """Return the lines without the one value that others change."""
    return [line for line in text.splitlines() if not line.startswith("backupctl_repository_free_bytes")]


def test_without_metrics_and_notices_the_last_verify_is_on_the_page_and_in_check(site):
    site.config.write_text(f'[vm.web]\nrepository = "{site.cli.repository}"\n')
    site.cli.environment["STATE_DIRECTORY"] = f"{site.state}:/other"
    page = site.directory / "report.html"
    site.lab.writer.write(5)
    site.lab.backup("full")
    site.cli.run("report", "web", "--html", str(page), vm=False)
    assert "none is known" in page.read_text()
    site.cli.run("verify", "web", vm=False)
    site.cli.run("report", "web", "--html", str(page), vm=False)
    assert "no damage, " in page.read_text()
    (image,) = site.cli.repository.glob("web/*/vda.qcow2")
    content = bytearray(image.read_bytes())
    content[len(content.rstrip(b"\0")) - 1] ^= 1
    image.write_bytes(content)
    site.cli.run("verify", "web", vm=False, code=4)
    assert "the verify of" in site.cli.run("check", "web", vm=False, code=2).stdout


def test_a_state_directory_that_nobody_asked_for_and_nobody_may_write_is_no_warning(site):
    site.config.write_text(f'[vm.web]\nrepository = "{site.cli.repository}"\n')
    site.cli.environment["STATE_DIRECTORY"] = "/proc/none"
    assert site.lab.backup("full")["warnings"] == []
    site.configure("")
    site.cli.environment["STATE_DIRECTORY"] = ""
    site.config.write_text(site.config.read_text().replace(f"{site.state}", "/proc/none"))
    (warning,) = site.lab.backup("incremental")["warnings"]
    assert warning["code"] == "metrics-not-written"
