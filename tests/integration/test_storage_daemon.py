# SPDX-License-Identifier: GPL-2.0-or-later
"""qemu-storage-daemon: a disk without a device, a monitor that takes no descriptors."""

import os
import subprocess

import pytest

from fixtures.debian import CannotBeHad
from fixtures.storage_daemon import StorageDaemon
from tests.conftest import ROOT, Cli


def test_the_disk_of_a_storage_daemon_is_backed_up_over_named_files(build, tmp_path, held):
    path = tmp_path / "disk.qcow2"
    subprocess.run([build.tool("qemu-img"), "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    daemon = StorageDaemon(build, path)
    held.callback(daemon.close)
    try:
        daemon.start()
    except CannotBeHad as err:
        pytest.skip(str(err))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, **build.environment(), "PYTHONPATH": str(ROOT)}
    cli = Cli(tmp_path / "repository", environment, scratch, ["--qmp", f"unix:{daemon.qmp_path}"])
    moments = {}
    for number, kind in enumerate(("full", "incremental", "incremental")):
        daemon.write(number * (4 << 20) + 512, os.urandom(1 << 20))
        report = cli.json(kind, "web")
        assert report["consistency"] == "crash"
        assert report["disks"][0]["name"] == "disk0"
        moments[report["point"]] = daemon.read()
    assert report["disks"][0]["copied_bytes"] <= (1 << 20) + 65536
    for point, moment in moments.items():
        assert cli.raw(point, "disk0", tmp_path) == moment
    assert cli.json("status", "web")["leftovers"] == []
    assert list(scratch.iterdir()) == []
