# SPDX-License-Identifier: GPL-2.0-or-later
"""What is made is for its owner alone, whatever umask we were started with: disks are in it."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from fixtures import builds
from fixtures.debian import CannotBeHad
from tests.conftest import MIB, ROOT


@pytest.fixture
def lab(make_lab):
    try:
        return make_lab(builds.simulator("7.2"), {"vda": 2 * MIB})
    except CannotBeHad as err:
        pytest.skip(str(err))


def open_to_others(root: Path) -> list[str]:
    """Name all below a directory, itself too, that others than its owner may read, write or enter."""
    return [
        f"{stat.S_IMODE(path.lstat().st_mode):o} {path}"
        for path in (root, *root.rglob("*"))
        if path.lstat().st_mode & 0o077
    ]


def call(lab, *arguments: str, vm: bool = True) -> None:
    subprocess.run(
        lab.cli.command(*arguments, vm=vm),
        env=lab.cli.environment,
        cwd=ROOT,
        umask=0,
        check=True,
        capture_output=True,
        timeout=120,
    )


def test_a_repository_and_what_is_restored_from_it_are_private(lab):
    """Without a umask, and by way of the process that makes the tests' and the drills' calls."""
    lab.writer.write(3)
    call(lab, "full", "web")
    assert open_to_others(lab.cli.repository) == []
    lab.writer.write(3)
    lab.backup("incremental")
    lab.cli.run("protect", "web", "latest", vm=False)
    lab.cli.run("prune", "web", "--keep-last", "1", vm=False)
    assert open_to_others(lab.cli.repository) == []
    for options in ((), ("--format", "raw"), ("--thin",)):
        restored = lab.directory / f"restored{len(options)}{options[-1:]}"
        lab.cli.run("restore", "web", "latest", "--to", f"{restored}/", *options, vm=False)
        assert open_to_others(restored) == []
    image = lab.directory / "one.qcow2"
    call(lab, "restore", "web", "--to", str(image), "--disk", "vda", vm=False)
    assert open_to_others(image) == []


def test_doctor_warns_of_a_repository_that_others_may_read_or_write(lab):
    lab.backup("full")

    def warned() -> list[dict]:
        told = lab.cli.json("doctor", "web")["findings"]
        return [one for one in told if (one["subject"], one["verdict"]) == ("repository", "warning")]

    directory = lab.cli.repository / "web"
    directory.chmod(0o711)  # as a thin restore's QEMU may need it: only who knows a name gets at it
    assert warned() == []
    lab.cli.repository.chmod(0o777)
    directory.chmod(0o740)
    both = warned()
    assert [one["said"] for one in both] == [
        f"{lab.cli.repository} is readable and writable by other users (mode 0777)",
        f"{directory} is readable by other users (mode 0740)",
    ]
    for one in both:
        subprocess.run(one["advice"].split(), check=True, timeout=10)
    assert warned() == []
    lab.directory.chmod(0o777)  # where anybody could put another repository in its place
    (above,) = warned()
    assert above["said"].startswith(f"{lab.directory} is not trusted")
    subprocess.run(above["advice"].split(), check=True, timeout=10)
    assert warned() == []
    if os.geteuid() == 0:
        os.chown(directory, 12345, -1)
        assert "belongs to user 12345" in warned()[0]["said"]
