# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever fails, nothing is lost: the next incremental is byte-equal, and nothing of ours is left."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from fixtures.proxy import Proxy
from fixtures.simulated import Simulated
from tests import interrupted_cli
from tests.conftest import make_cli

pytestmark = pytest.mark.simulator_too

SLOW = ("--limit", "2M")  # slow enough to be met in mid-copy


@pytest.fixture
def lab(build, make_lab):
    made = make_lab(build)
    made.writer.write(80)
    made.backup("full")
    made.writer.write(40)
    return made


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def exporting(lab) -> Callable[[], bool]:
    return lambda: bool(lab.machine.qmp("query-block-exports"))


def copying(lab) -> Callable[[], bool]:
    """Whether the copy has written something."""

    def look() -> bool:
        images = list((lab.cli.repository / "web").glob("*.partial/*.qcow2"))
        return exporting(lab)() and any(image.stat().st_blocks * 512 > 300_000 for image in images)

    return look


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_copy_rolls_back_and_leaves_with_1(lab, number):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        run.send_signal(number)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 1, told
    assert "rolled back" in told
    lab.assert_at_rest()
    lab.next_is_right()


def test_a_signal_is_heard_while_somebody_else_holds_the_monitor(lab):
    """Who comes second is let in and not greeted."""
    before = lab.cli.json("list", "web", vm=False)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(lab.machine.qmp_path))
        assert other.recv(10)
        with lab.cli.start("incremental", "web") as run:
            assert run.stderr.readline().endswith("prepare\n")
            begun = time.monotonic()
            run.send_signal(signal.SIGTERM)
            _, told = run.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert run.returncode == 1, told
    assert "SIGTERM" in told
    assert "the backup was not started; nothing changed" in told
    assert "Error" not in told
    assert lab.cli.json("list", "web", vm=False) == before
    lab.next_is_right()


def test_sigkill_in_mid_copy_is_undone_by_the_next_run(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        run.kill()
        run.communicate(timeout=60)
    assert lab.cli.json("status", "web")["leftovers"]
    lab.next_is_right()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_ends_with_replies_unread_leaves_no_export(build, make_lab, number):
    """QEMU keeps an export while a reply waits to be read, so somebody must read it."""
    lab = make_lab(build, {"vda": 96 << 20})
    lab.machine.io("vda", "write -q -P 7 0 96M")
    lab.writer.model["vda"][:] = b"\7" * (96 << 20)
    with lab.cli.start("full", "web") as run:
        wait_for(exporting(lab))
        run.send_signal(signal.SIGSTOP)  # with requests in flight; QEMU answers as far as the socket takes it
        time.sleep(0.3)
        run.send_signal(number)
        run.send_signal(signal.SIGCONT)
        _, told = run.communicate(timeout=60)
    assert run.returncode == (1 if number == signal.SIGTERM else -number), told
    lab.next_is_right()


def test_recover_undoes_what_a_killed_run_left_and_then_does_nothing(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        run.kill()
        run.communicate(timeout=60)
    assert lab.cli.json("recover", "web")["actions"]
    lab.assert_at_rest()
    assert lab.cli.json("recover", "web")["actions"] == []
    assert lab.cli.json("status", "web")["leftovers"] == []
    lab.next_is_right()


@pytest.mark.parametrize(("at", "code"), [("query-version", 3), ("blockdev-del", 0), ("transaction", 0)])
def test_sigterm_ends_recover_before_its_clean_up_and_never_in_it(lab, at, code):
    """Half a clean-up would be left to do. What comes too late to be obeyed is no failure."""
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        run.kill()
        run.communicate(timeout=60)
    ended = lab.cli.call("recover", "web", entry=interrupted_cli.ENTRY, KILL_AT=at, ACTION="term")
    assert ended.returncode == code, ended.stderr
    if code:
        assert "SIGTERM" in ended.stderr
        assert lab.cli.json("recover", "web")["actions"]
    lab.assert_at_rest()
    lab.next_is_right()


@pytest.mark.parametrize("dropped", ["exp0", "exp1"])
def test_a_connection_dropped_in_mid_copy_is_a_failed_run(lab, dropped):
    """One disk that can't be read fails the run: a point without it is none."""
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        for export in lab.machine.qmp("query-block-exports"):
            if export["id"].endswith(dropped):
                lab.machine.qmp("block-export-del", id=export["id"], mode="hard")
        _, told = run.communicate(timeout=60)
    assert run.returncode == 1, told
    assert "lost" in told
    lab.assert_at_rest()
    lab.next_is_right()


@pytest.mark.parametrize("verdict", ["cut", "after"])
@pytest.mark.parametrize(
    "command", ["blockdev-add", "transaction", "nbd-server-start", "block-export-add", "block-export-del"]
)
def test_a_monitor_closed_at_a_command_is_asked_again_what_is_the_case(any_build, make_lab, command, verdict):
    """The command is lost, or only its answer is: nobody can know which, so QEMU is asked."""
    lab = make_lab(any_build)
    lab.writer.write(40)
    lab.backup("full")
    lab.writer.write(20)
    spoilt = []

    def spoil(content: bytes) -> str:
        if not spoilt and f'"{command}"'.encode() in content:
            spoilt.append(content)
            return verdict
        return ""

    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path, spoil):
        direct, lab.cli.vm[1] = lab.cli.vm[1], f"unix:{path}"
        lab.cli.run("incremental", "web", code=1)
        lab.cli.vm[1] = direct
    assert spoilt
    lab.assert_at_rest()
    lab.next_is_right()


def test_a_monitor_that_stays_away_needs_recovery_and_says_so(lab):
    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path) as proxy:
        direct, lab.cli.vm[1] = lab.cli.vm[1], f"unix:{path}"
        with lab.cli.start("incremental", "web", *SLOW) as run:
            wait_for(copying(lab))
            path.unlink()
            proxy.cut()
            _, told = run.communicate(timeout=90)
        lab.cli.vm[1] = direct
    assert run.returncode == 3, told
    assert "backupctl recover web" in told
    lab.cli.run("recover", "web")
    lab.assert_at_rest()
    lab.next_is_right()


def test_an_agent_that_never_answers_costs_the_freeze_not_the_backup(lab):
    lab.agent.behaviour["*"] = "silent"
    error = lab.backup("incremental", "--freeze", "require", code=1)["error"]
    assert "agent does not answer" in error["message"]
    lab.assert_at_rest()
    lab.writer.remember()
    report = lab.backup("incremental")
    assert (report["consistency"], report["frozen_ms"]) == ("crash", None)
    lab.assert_point(report["point"], lab.writer.moment)
    lab.agent.behaviour.clear()
    lab.next_is_right()


def test_an_agent_that_refuses_to_freeze_is_obeyed(lab):
    lab.agent.behaviour["guest-fsfreeze-freeze"] = "refuse"
    error = lab.backup("incremental", "--freeze", "require", code=1)["error"]
    assert "refused guest-fsfreeze-freeze" in error["message"]
    lab.assert_at_rest()
    lab.writer.remember()
    report = lab.backup("incremental")
    assert report["consistency"] == "crash"
    lab.assert_point(report["point"], lab.writer.moment)
    lab.agent.behaviour.clear()
    lab.next_is_right()


def test_an_agent_that_refuses_to_freeze_is_obeyed_by_the_automatic_view_too(newest_build, make_lab):
    """Two disks without a freeze are one moment only with fleecing."""
    lab = make_lab(newest_build)
    lab.writer.write(20)
    lab.agent.behaviour["guest-fsfreeze-freeze"] = "refuse"
    lab.writer.remember()
    report = lab.backup("full", "--view", "auto")
    assert report["consistency"] == "crash"
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_freeze_that_is_not_answered_is_thawed_and_the_run_rolled_back(lab):
    lab.agent.behaviour["guest-fsfreeze-freeze"] = "unanswered"
    error = lab.backup("incremental", "--freeze-budget", "1", code=1)["error"]
    assert "did not answer" in error["message"]
    lab.agent.behaviour.clear()
    lab.assert_at_rest()
    assert len(lab.agent.freezes) == len(lab.agent.thaws)
    lab.next_is_right()


def test_a_freeze_that_somebody_ended_early_is_not_called_consistent(lab):
    def end_it(content: bytes) -> str:
        if b'"transaction"' in content and lab.agent.frozen:
            lab.agent.thawed_by_somebody()
        return ""

    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path, end_it):
        direct, lab.cli.vm[1] = lab.cli.vm[1], f"unix:{path}"
        error = lab.backup("incremental", "--freeze", "require", code=1)["error"]
        report = lab.backup("incremental")
        lab.cli.vm[1] = direct
    assert "somebody in the guest thawed" in error["message"]
    assert (report["consistency"], report["frozen_ms"]) == ("crash", None)
    lab.assert_at_rest()
    lab.next_is_right()


def test_a_guest_that_somebody_else_froze_is_refused_and_left_frozen(lab):
    lab.agent.frozen = True
    error = lab.backup("incremental", code=1)["error"]
    assert "somebody else" in error["message"]
    assert lab.agent.frozen
    lab.agent.frozen = False
    lab.assert_at_rest()
    lab.next_is_right()


def test_sigkill_while_frozen_thaws_the_guest_by_the_guard(lab):
    lab.agent.late_seconds = 3
    lab.agent.behaviour["guest-fsfreeze-freeze"] = "late"
    with lab.cli.start("incremental", "web") as run:
        wait_for(lambda: lab.agent.frozen)
        run.kill()
        run.communicate(timeout=60)
    lab.agent.behaviour.clear()
    wait_for(lambda: not lab.agent.frozen)
    lab.next_is_right()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root")


@pytest.fixture
def mounted(held):
    """Mount a tmpfs; unmounted at the end."""

    def mount(directory, options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=False)
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        held.callback(subprocess.run, ["umount", "-l", directory], check=True)

    return mount


@needs_root
def test_a_target_that_is_full_leaves_what_was_there(any_build, make_lab, mounted):
    lab = make_lab(any_build)
    lab.cli.repository.mkdir()
    mounted(lab.cli.repository, "size=22m")
    lab.writer.write(80)
    first = lab.backup("full")["point"]
    moment = lab.writer.moment
    lab.writer.write(400)
    lab.writer.do("vda", "data", 0, 16 << 20, 0x33)
    error = lab.backup("full", code=1)["error"]
    assert re.search(r"cannot write vd[ab]\.qcow2 in .*web.*: .*No space left", error["message"])
    assert "rolled back" in error["state"]
    lab.assert_at_rest()
    lab.assert_point(first, moment)
    subprocess.run(["mount", "-o", "remount,size=80m", lab.cli.repository], check=True)
    lab.next_is_right()


@needs_root
def test_a_repository_beside_the_guests_disks_does_not_fill_their_file_system(
    any_build, make_lab, mounted, tmp_path
):
    """Else the next write of the guest to a new place would fail."""
    mounted(tmp_path, "size=330m")
    lab = make_lab(any_build, {"vda": 32 << 20})
    lab.writer.do("vda", "data", 0, 32 << 20, 0x33)
    told = lab.backup("full", code=1)["error"]
    assert "vda is on it too" in told["message"]
    assert "rolled back" in told["state"]
    lab.assert_at_rest(bitmaps_each=0)
    subprocess.run(["mount", "-o", "remount,size=600m", tmp_path], check=True)
    lab.next_is_right()


@needs_root
def test_a_target_that_is_not_writable_is_refused_before_anything_is_touched(any_build, make_lab, mounted):
    lab = make_lab(any_build)
    lab.cli.repository.mkdir()
    mounted(lab.cli.repository, "size=60m")
    lab.writer.write(20)
    lab.backup("full")
    subprocess.run(["mount", "-o", "remount,ro", lab.cli.repository], check=True)
    lab.writer.write(20)
    before = len(lab.agent.freezes)
    error = lab.backup("incremental", code=1)["error"]
    assert "cannot write" in error["message"]
    assert len(lab.agent.freezes) == before
    subprocess.run(["mount", "-o", "remount,rw", lab.cli.repository], check=True)
    lab.next_is_right()


def test_qemu_killed_in_mid_copy_then_started_again_scans(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        lab.machine.kill()
        _, told = run.communicate(timeout=90)
    assert run.returncode == 3, told
    lab.machine.start()
    report = lab.backup("incremental")
    assert all(disk["scanned"] for disk in report["disks"])
    lab.assert_at_rest()


def test_qemu_quitting_cleanly_in_mid_copy_loses_no_change(lab):
    """Both bitmaps are stored; the next run gives the new one back to the old one."""
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        lab.machine.quit()
        run.communicate(timeout=90)
    assert run.returncode == 3
    lab.machine.start()
    lab.writer.write(5)
    report = lab.backup("incremental")
    assert {disk["kind"] for disk in report["disks"]} == {"incremental"}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()


def test_a_second_run_is_told_that_the_first_one_works(lab):
    lab.writer.do("vda", "data", 0, 16 << 20, 0x44)
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        with lab.cli.start("recover", "web") as recovery:
            error = lab.backup("incremental", code=75)["error"]
            recovery.communicate(timeout=60)
        assert "another run" in error["message"]
        assert recovery.returncode == 75
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    lab.next_is_right()


@pytest.mark.needs_qemu("it is about our own lock: one place is enough")
def test_of_eight_runs_at_once_one_goes_on(any_build, make_lab):
    lab = make_lab(any_build)
    lab.backup("full")
    lab.writer.do("vda", "data", 0, 16 << 20, 0x44)
    slow = ("--limit", "500K")  # the first is at work while a busy machine starts the others
    with ExitStack() as running:
        runs = [running.enter_context(lab.cli.start("incremental", "web", *slow)) for _ in range(8)]
        wait_for(lambda: sum(run.poll() is not None for run in runs) == 7, 60)
        assert {run.returncode for run in runs} == {None, 75}
        (at_work,) = (run for run in runs if run.poll() is None)
        at_work.send_signal(signal.SIGTERM)
        for run in runs:
            run.communicate(timeout=60)
    assert at_work.returncode == 1
    lab.next_is_right()


def test_the_nbd_server_of_somebody_else_is_left_alone(lab):
    path = lab.machine.directory / "foreign"
    lab.machine.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    error = lab.backup("incremental", code=1)["error"]
    assert "NBD server already running" in error["message"]
    assert lab.machine.qmp("nbd-server-stop") == {}, "it was to be still there"
    lab.next_is_right()


def test_the_nbd_server_of_somebody_else_outlives_the_recovery_of_a_run_that_had_none(any_build, make_lab):
    """It has no export yet by which it could be told from ours, but the run's journal tells."""
    lab = make_lab(any_build, {"vda": 8 << 20})
    lab.agent.behaviour["guest-fsfreeze-freeze"] = "late"
    with lab.cli.start("full", "web") as run:
        wait_for(lambda: list((lab.cli.repository / "web").glob("*.partial/run.json")))
        wait_for(lambda: any("-tmp0" in str(node) for node in lab.machine.qmp("query-named-block-nodes")))
        run.kill()
        run.communicate(timeout=60)
    lab.agent.behaviour.clear()
    address = {"type": "unix", "data": {"path": str(lab.machine.directory / "foreign")}}
    assert lab.machine.qmp("nbd-server-start", addr=address) == {}
    assert lab.cli.json("recover", "web")["actions"]
    assert lab.machine.qmp("nbd-server-stop") == {}, "it was to be still there"
    lab.assert_at_rest(bitmaps_each=0)


@pytest.mark.needs_qemu("the simulator has no blockdev-snapshot-sync")
def test_an_external_snapshot_while_the_run_begins_is_noticed(lab):
    """The moment would be that of a layer to which the guest writes no more. (Later ones QEMU refuses.)"""
    spoilt = []

    def spoil(content: bytes) -> str:
        if not spoilt and b'"add-fd"' in content:
            spoilt.append(content)
            snapshot = {"snapshot-file": str(lab.directory / "over.qcow2"), "snapshot-node-name": "over"}
            assert lab.machine.qmp("blockdev-snapshot-sync", **{"node-name": "node-vda"}, **snapshot) == {}
        return ""

    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path, spoil):
        direct, lab.cli.vm[1] = lab.cli.vm[1], f"unix:{path}"
        error = lab.backup("full", code=1)["error"]
        lab.cli.vm[1] = direct
    assert spoilt
    assert "external snapshot" in error["message"]
    assert "rolled back" in error["state"]
    lab.writer.write(5)
    report = lab.backup("incremental")
    assert {disk["name"]: disk["scanned"] for disk in report["disks"]} == {"vda": True, "vdb": False}
    lab.assert_point(report["point"], lab.writer.moment)


def test_a_base_that_somebody_disables_while_the_run_begins_is_noticed(lab):
    """The transaction would disable it once more, and hide what is missing from it."""
    (base,) = lab.machine.bitmaps()["node-vda"]
    spoilt = []

    def spoil(content: bytes) -> str:
        if not spoilt and b'"add-fd"' in content:
            spoilt.append(content)
            lab.machine.qmp("block-dirty-bitmap-disable", node="node-vda", name=base)
            lab.writer.do("vda", "data", 0, 65536, 0x77)
        return ""

    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path, spoil):
        direct, lab.cli.vm[1] = lab.cli.vm[1], f"unix:{path}"
        error = lab.backup("incremental", code=1)["error"]
        lab.cli.vm[1] = direct
    assert spoilt
    assert "somebody removed or disabled" in error["message"]
    report = lab.backup("incremental")
    assert {disk["name"]: disk["scanned"] for disk in report["disks"]} == {"vda": True, "vdb": False}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.next_is_right()


def test_a_transaction_that_qemu_refuses_is_rolled_back_with_the_guest_thawed(lab):
    """The guard has the agent in hand, which serves one client only; nobody may wait for it."""
    point = lab.backup("incremental")["point"]
    tag = json.loads((lab.cli.repository / "repository.json").read_text())["id"][:8]
    name = f"backupctl-{tag}-{point}-vdb"
    spoilt = []

    def spoil(content: bytes) -> str:
        if not spoilt and b'"transaction"' in content:
            spoilt.append(content)
            lab.machine.qmp("block-dirty-bitmap-remove", node="node-vdb", name=name)
        return ""

    path = lab.machine.directory / "proxy"
    with Proxy(path, lab.machine.qmp_path, spoil):
        direct, lab.cli.vm[1] = lab.cli.vm[1], f"unix:{path}"
        error = lab.backup("incremental", code=1)["error"]
        lab.cli.vm[1] = direct
    assert spoilt
    assert "transaction" in error["message"]
    assert not lab.agent.frozen
    assert lab.agent.thaws[-1] - lab.agent.freezes[-1] < 5, "it was not to wait for the end of its budget"
    lab.writer.write(5)
    report = lab.backup("incremental")
    assert {disk["name"]: disk["scanned"] for disk in report["disks"]} == {"vda": False, "vdb": True}
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()


@pytest.mark.parametrize("kind", ["full", "incremental"])
def test_a_failed_run_does_not_heal_a_bitmap_that_somebody_had_disabled(lab, kind):
    """What was written while it was disabled is in no bitmap: an incremental from it would have a gap."""
    name = lab.machine.bitmaps()["node-vda"][0]
    lab.machine.qmp("block-dirty-bitmap-disable", node="node-vda", name=name)
    lab.writer.write(30)
    with lab.cli.start(kind, "web", *SLOW) as run:
        wait_for(copying(lab))
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    assert run.returncode == 1
    lab.writer.write(5)
    report = lab.backup("incremental")
    assert {disk["name"]: disk["scanned"] for disk in report["disks"]}["vda"]
    lab.assert_point(report["point"], lab.writer.moment)
    lab.assert_at_rest()


def test_a_hang_up_of_the_terminal_rolls_back(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        run.send_signal(signal.SIGHUP)
        run.communicate(timeout=60)
    assert run.returncode == 1
    lab.assert_at_rest()
    lab.next_is_right()


def test_a_reader_of_our_words_that_leaves_does_not_stop_the_roll_back(lab):
    with lab.cli.start("incremental", "web", *SLOW) as run:
        wait_for(copying(lab))
        run.stderr.close()
        run.send_signal(signal.SIGTERM)
        run.wait(60)
    lab.assert_at_rest()
    lab.next_is_right()


def test_an_agent_without_freezing_costs_the_freeze_not_the_backup(lab):
    lab.agent.behaviour["guest-fsfreeze-status"] = "refuse"
    lab.writer.remember()
    report = lab.backup("incremental")
    assert report["consistency"] == "crash"
    lab.assert_point(report["point"], lab.writer.moment)
    lab.agent.behaviour.clear()
    lab.next_is_right()


def test_a_scratch_file_that_fills_up_ends_the_run_before_it_is_full():
    """QEMU tells that its write threshold is passed; on the simulator, which never makes the guest wait."""
    with Simulated("--disk", "vda=600M", "--version", "10.0.2") as vm:
        vm.control("write", disk="vda", offset=0, length=600 << 20, pattern=1)
        cli = make_cli(vm, vm.directory)
        cli.run("full", "web")
        with cli.start("full", "web", "--limit", "4M", "--scratch-size", "512M") as run:
            wait_for(lambda: vm.qmp("query-block-exports"))
            vm.control("write", disk="vda", offset=0, length=200 << 20, pattern=2)
            time.sleep(0.5)
            assert run.poll() is None, "there is room for that"
            vm.control("write", disk="vda", offset=200 << 20, length=100 << 20, pattern=2)
            _, told = run.communicate(timeout=60)
        assert run.returncode == 1, told
        assert "gave up before the guest's own writes could fail" in " ".join(told.split())
        assert vm.leftovers() == []
        assert vm.qmp("qom-list", path="/objects") == [{"name": "type", "type": "string"}]
        assert cli.json("incremental", "web")["disks"][0]["copied_bytes"] == 300 << 20
