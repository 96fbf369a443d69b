# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a VM as they are written, and what the configuration refuses of them."""

from pathlib import Path

import pytest

from backupctl.cli import image_texts, settings_check
from backupctl.errors import InvalidName, UsageError
from backupctl.options import ImageFile, VmImage


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("/a/web.qcow2", [("/a/web.qcow2", "qcow2")]),
        ("/dev/vg/web,format=raw", [("/dev/vg/web", "raw")]),
        ("/a/b,,c.qcow2", [("/a/b,c.qcow2", "qcow2")]),
        ("/a/top,backing=/a/base,format=raw", [("/a/top", "qcow2"), ("/a/base", "raw")]),
        (
            "/a/x,format=qcow2,backing=/a/y,backing=/a/z=1",
            [("/a/x", "qcow2"), ("/a/y", "qcow2"), ("/a/z=1", "qcow2")],
        ),
    ],
)
def test_files_with_their_formats_and_backing_files(text, files):
    expected = tuple(ImageFile(Path(path), kind) for path, kind in files)
    assert image_texts.parse("vda", text) == VmImage("vda", expected)


@pytest.mark.parametrize(
    "text", ["", "/a,format=vmdk", "/a,format=", "/a,backing=", "/a,raw", "/a,,,x", ",/a"]
)
def test_what_is_not_an_image_is_refused(text):
    with pytest.raises(UsageError):
        image_texts.parse("vda", text)


def test_a_name_that_could_lead_out_of_the_repository_is_refused():
    with pytest.raises(InvalidName):
        image_texts.parse("../x", "/a")


def mistakes(image: object) -> list[str]:
    _, found = settings_check.check({"vm": {"web": {"image": image}}}, "")
    return [one.message for one in found]


def test_the_configuration_names_images_by_absolute_paths():
    found, none = settings_check.check(
        {"vm": {"web": {"image": {"vda": "/a,backing=/b"}, "when_off": "skip"}}}, ""
    )
    assert none == []
    assert found.vm["web"].image == {"vda": "/a,backing=/b"}
    assert found.vm["web"].when_off == "skip"


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ({"vda": "web.qcow2"}, "absolute"),
        ({"vda": "/a,backing=b"}, "absolute"),
        ({"vda": "/a,format=vdi"}, "not part of an image"),
        ({"vda": 5}, "not part of an image"),
        ({"../vda": "/a"}, "disk name"),
        ("/a", "must be a table"),
    ],
)
def test_a_mistake_in_an_image_is_told(image, why):
    (told,) = mistakes(image)
    assert why in told


def test_when_off_has_three_values():
    _, (told,) = settings_check.check({"vm": {"web": {"when_off": "stop"}}}, "")
    assert "backup, skip, fail" in told.message
