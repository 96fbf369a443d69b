# SPDX-License-Identifier: GPL-2.0-or-later
"""The file for Prometheus: its format, who may read it, and that it is always whole."""

import os
import stat
from pathlib import Path

import pytest

from backupctl.errors import UsageError
from backupctl.monitoring import exposition, metrics
from backupctl.monitoring.exposition import Gauge
from backupctl.monitoring.memory import Memory, Past, Record
from tests.unit.monitoring import exposition_format
from tests.unit.points import P1, P2

DONE = Record(
    command="full", ended=1e9, seconds=2.5, exit_code=0, copied_bytes=4096, stored_bytes=512, frozen_ms=40
)
FAILED = Record(command="incremental", ended=1e9 + 60, seconds=1, exit_code=1, reason="MonitorUnreachable")
VERIFIED = Record(command="verify", ended=1e9 + 90, seconds=1, exit_code=4, reason="DamageFound", damage=2)


def found(
    memory: Memory, repository: Path, stored: metrics.Stored | None
) -> dict[str, exposition_format.Metric]:
    text = exposition.text(metrics.gauges("vm1", memory, repository, stored))
    read = exposition_format.read(text)
    assert all(one.labels["vm"] == "vm1" for one in read.values())
    return {name.removeprefix("backupctl_"): one for name, one in read.items()}


def test_everything_that_is_known_is_told_in_base_units(two_points):
    builder = two_points[0]
    memory = Memory(backup=Past(last=FAILED, success=DONE), verify=Past(last=VERIFIED))
    seen = found(memory, builder.repository.path, metrics.look(builder.directory))
    values = {name: one.value for name, one in seen.items()}
    assert values.pop("repository_free_bytes") <= values.pop("repository_size_bytes")
    assert values == {
        "last_success_timestamp_seconds": builder.directory.point(P2).manifest.started.timestamp(),
        "last_run_timestamp_seconds": 1e9 + 60,
        "last_run_success": 0,
        "last_run_exit_code": 1,
        "last_run_duration_seconds": 1,
        "last_success_copied_bytes": 4096,
        "last_success_stored_bytes": 512,
        "last_success_frozen_seconds": 0.04,
        "last_run_info": 1,
        "points": 2,
        "newest_point_timestamp_seconds": builder.directory.point(P2).manifest.started.timestamp(),
        "chain_layers": 2,
        "last_verify_timestamp_seconds": 1e9 + 90,
        "last_verify_success": 0,
        "last_verify_damage": 2,
    }
    assert seen["last_run_info"].labels["reason"] == "MonitorUnreachable"


def test_what_is_not_known_is_left_out(tmp_path):
    assert list(metrics.gauges("vm1", Memory(), tmp_path / "none", None)) == []
    assert set(found(Memory(backup=Past(last=FAILED)), tmp_path / "none", None)) == {
        *(
            "last_run_timestamp_seconds",
            "last_run_success",
            "last_run_exit_code",
            "last_run_duration_seconds",
        ),
        "last_run_info",
    }


def test_a_damaged_chain_has_no_length_and_fails_nothing(two_points):
    builder = two_points[0]
    (builder.directory.path / P1 / "manifest.json").write_text("{}")
    seen = metrics.look(builder.directory)
    assert (seen.points, seen.layers) == (1, None)


def test_labels_are_escaped():
    gauge = Gauge("backupctl_points", "Help.", {"vm": 'a\\b"c\nd'}, 1)
    read = exposition_format.read(exposition.text([gauge]))
    assert read["backupctl_points"].labels == {"vm": 'a\\b"c\nd'}


@pytest.mark.parametrize(
    ("configured", "file"),
    [("/d/e", "/d/e/backupctl-web.prom"), ("/d/own.prom", "/d/own-web.prom")],
)
def test_each_vm_has_a_file_of_its_own(configured, file):
    directory, name = exposition.file_of(Path(configured), "web")
    assert str(directory / name) == file
    assert exposition.file_of(Path(configured), "db") != (directory, name)


def test_the_collector_may_read_the_file_whatever_the_umask_is_and_sees_no_other(tmp_path):
    before = os.umask(0o077)
    try:
        for content in ("old\n", "new\n"):
            (tmp_path / ".x.prom.new").write_text("left by a crash")
            exposition.write(tmp_path, "x.prom", content)
    finally:
        os.umask(before)
    assert (tmp_path / "x.prom").read_text() == "new\n"
    assert stat.S_IMODE((tmp_path / "x.prom").stat().st_mode) == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["x.prom"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    exposition.write(tmp_path, "x.prom", "old\n")

    def fail(*_: object) -> None:
        assert (tmp_path / "x.prom").read_text() == "old\n"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", fail)
    with pytest.raises(OSError, match="No space"):
        exposition.write(tmp_path, "x.prom", "new\n")
    assert (tmp_path / "x.prom").read_text() == "old\n"


def test_a_link_in_the_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("theirs")
    for name in ("x.prom", ".x.prom.new"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    exposition.write(tmp_path, "x.prom", "new\n")
    assert (tmp_path / "victim").read_text() == "theirs"
    assert not (tmp_path / "x.prom").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_another_user_can_not_choose_the_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    exposition.write(tmp_path / "link", "x.prom", "new\n")
    os.lchown(tmp_path / "link", 12345, 12345)
    with pytest.raises(UsageError, match="symbolic link of user 12345"):
        exposition.write(tmp_path / "link", "x.prom", "new\n")
    os.chown(tmp_path / "real", 12345, 12345)  # the collector's own directory is no danger
    exposition.write(tmp_path / "real", "x.prom", "new\n")
