# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a VM as they are written, and what the configuration refuses of them."""

from pathlib import Path

import pytest

from backupctl.cli import image_texts, settings_check
from backupctl.cli.configuration import Config
from backupctl.cli.target import Target
from backupctl.errors import InvalidName, UsageError
from backupctl.names import VmName
from backupctl.options import ImageFile, VmConfig, VmImage
from backupctl.system.address import Address
from backupctl.vm.open_driver import is_remote


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


def test_an_image_on_another_host_may_have_any_absolute_path_there():
    found = image_texts.parse("vda", "ssh://root@vmhost:22/a b/web.qcow2,backing=/c")
    assert found.files == (ImageFile(Path("/a b/web.qcow2")), ImageFile(Path("/c")))
    assert found.host is not None
    assert found.host[1:] == ("vmhost", 22, "root")


@pytest.mark.parametrize(
    "text", ["ssh://vmhost", "ssh://-oProxyCommand=x/a", "ssh://vmhost/a,backing=b", "ssh://vmhost:0/a"]
)
def test_what_is_not_an_image_on_another_host_is_refused(text):
    with pytest.raises(UsageError):
        image_texts.parse("vda", text)


def vm(*words: str, **more: object) -> VmConfig:
    given = tuple(image_texts.parse(f"vd{number}", word) for number, word in enumerate(words))
    return Target(Config(), VmName("web"), None, False, image=given, **more).vm()


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["ssh://host/a", "/b"], {}),
        (["ssh://host/a", "ssh://other/b"], {}),
        (["ssh://host/a"], {"qmp": Address.parse("/q")}),
        (["/a"], {"qmp": Address.parse("ssh://host/q")}),
        (["ssh://user@host/a"], {"qmp": Address.parse("ssh://host/q")}),
        (["ssh://host/a"], {"libvirt": "qemu:///system"}),
        (["/a"], {"libvirt": "qemu+ssh://host/system"}),
    ],
)
def test_images_that_are_not_on_the_host_of_their_vm_are_refused(words, more):
    with pytest.raises(UsageError, match="is on"):
        vm(*words, **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"qmp": Address.parse("ssh://root@host/q")},
        {"libvirt": "qemu+ssh://root@host/system"},
    ],
)
def test_images_on_the_host_of_their_vm_are_read_there(more):
    found = vm("ssh://root@host/a", "ssh://root@host/b", **more)
    assert [one.host is not None for one in found.images] == [True, True]
    assert is_remote(found)


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
