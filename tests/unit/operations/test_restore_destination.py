# SPDX-License-Identifier: GPL-2.0-or-later
"""One rule says what `--to` names."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from backupctl.errors import TargetExists, UsageError
from backupctl.operations.restore import destination
from tests.unit.points import disk_entry

ENTRY = disk_entry("vda")
RAW = replace(ENTRY, format="raw")


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("directory.d").mkdir()
    for name in ("web", "disk.0", "x.vmdk", "x.img"):
        Path(name).touch()


@pytest.mark.parametrize(
    ("to", "wanted", "expected"),
    [
        ("-", None, ("-", "raw")),
        ("new", None, ("new/vda.qcow2", "qcow2")),
        ("new", "raw", ("new/vda.raw", "raw")),
        ("new.d/", None, ("new.d/vda.qcow2", "qcow2")),
        ("directory.d", None, ("directory.d/vda.qcow2", "qcow2")),
        ("new.qcow2", None, ("new.qcow2", "qcow2")),
        ("new.RAW", None, ("new.RAW", "raw")),
        ("new.img", None, ("new.img", "raw")),
        ("new.img", "qcow2", ("new.img", "qcow2")),
        ("new.0", "raw", ("new.0", "raw")),
        ("new.vmdk", "raw", ("new.vmdk", "raw")),
    ],
)
def test_a_new_image_goes_where_the_rule_says(to, wanted, expected):
    assert destination.of_new(RAW, to, wanted) == expected


@pytest.mark.parametrize("name", ["web", "disk.0"])
def test_a_file_whose_name_tells_nothing_is_replaced_by_what_the_disk_was(name):
    assert destination.of_new(RAW, name, None) == (name, "raw")
    assert destination.of_new(ENTRY, name, None) == (name, "qcow2")


@pytest.mark.parametrize("to", ["new.vmdk", "new.VHDX", "new.0", "restored.2026-11-27", "x.vmdk"])
def test_another_suffix_is_refused_with_those_that_there_are(to):
    with pytest.raises(UsageError, match="qcow2, raw") as caught:
        destination.of_new(RAW, to, None)
    assert f"--to {to}/ for a directory" in caught.value.hint
    assert caught.value.state == "nothing was touched"


@pytest.mark.parametrize("name", ["web", "disk.0", "x.img", "x.vmdk"])
def test_an_image_that_is_there_is_what_the_disk_was_in_the_vm_whatever_its_name(name):
    assert destination.of_existing(RAW, name, None) == (name, "raw")
    assert destination.of_existing(ENTRY, name, None) == (name, "qcow2")
    assert destination.of_existing(ENTRY, name, "raw") == (name, "raw")
    assert destination.of_existing(RAW, "directory.d", None) == ("directory.d/vda.raw", "raw")


@pytest.mark.parametrize(
    ("driver", "expected"), [("file", "raw"), ("host_device", "raw"), ("luks", None), ("throttle", None)]
)
def test_a_driver_that_is_no_format_is_raw_or_asked_for(driver, expected):
    entry = replace(ENTRY, format=driver)
    if expected:
        assert destination.in_the_vm(entry) == expected
        return
    with pytest.raises(UsageError, match=driver) as caught:
        destination.in_the_vm(entry)
    assert "--format" in caught.value.hint


@pytest.mark.parametrize("to", ["gone/x.raw", "gone/new/", "gone/new", "web/x.raw", "gone/far/x.qcow2"])
def test_a_missing_directory_above_is_told_as_that(to):
    target, _ = destination.of_new(ENTRY, to, None)
    with pytest.raises(
        UsageError, match=r"directory .*/(gone|web|gone/far) (does not exist|is not a directory)"
    ):
        destination.refuse_unplaceable(to, Path(target))


@pytest.mark.parametrize("to", ["new", "new/", "directory.d", "directory.d/x.raw", "x.raw", "web"])
def test_a_directory_whose_own_directory_is_there_is_none(to):
    target, _ = destination.of_new(ENTRY, to, None)
    destination.refuse_unplaceable(to, Path(target))


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "device", "link"])
def test_what_is_no_plain_file_is_named_as_what_it_is(tmp_path, kind):
    path = tmp_path / "vda.raw"
    words = {"device": "a character device", "link": "dangling"}.get(kind, f"a {kind}")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null" if kind == "device" else "/no/such/file")
    with pytest.raises(TargetExists, match=words):
        destination.refuse_unplaceable(str(tmp_path), path)
