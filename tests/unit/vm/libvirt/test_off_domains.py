# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain that is off: which bitmaps tell of a disk, which go, and which images are opened."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from backupctl.errors import Refused
from backupctl.names import DiskName, Namespace, NodeName, PointId, VmName
from backupctl.options import ImageFile, LibvirtAccess, VmConfig, VmImage
from backupctl.vm.bitmap import Bitmap
from backupctl.vm.disk import Disk
from backupctl.vm.driver import DiskSnapshot
from backupctl.vm.libvirt import (
    checkpoints,
    domain,
    inventory,
    job,
    off_checkpoints,
    off_images,
    off_session,
)
from backupctl.vm.libvirt.checkpoints import Checkpoint
from backupctl.vm.libvirt.off_checkpoints import Layer

OURS = Namespace("0123abcd")
A, B, C = (PointId(f"2026112{number}T000000Z") for number in range(1, 4))
SIZE = 4 << 20


class Facts:
    """A repository that has committed these points, and in which those others are another VM's."""

    namespace = OURS

    def __init__(self, *committed, others=()):
        self._committed, self._others = committed, others

    def is_committed(self, point):
        return point in self._committed

    def is_another_vms(self, point):
        return point in self._others

    def what_became_of(self, named):
        return {}

    def checkpoints(self):
        return 0


def bitmap(name="c", node="image0", **state):
    whole = Bitmap(name, NodeName(node), 65536, 65536, True, False, True, False)
    return replace(whole, **state)


def layer(*bitmaps, node="image0", size=SIZE):
    return Layer(NodeName(node), size, {one.name: one for one in bitmaps})


BELOW = layer(bitmap(node="b"), node="b")


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ([layer(bitmap())], 1),
        ([layer(bitmap()), BELOW], 2),
        ([layer(bitmap()), layer(node="b")], 1),
        ([layer(bitmap()), layer(node="b"), layer(bitmap(node="d"), node="d")], 0),
        ([layer(), BELOW], 0),
        ([layer()], 0),
        ([], 0),
        ([layer(bitmap(recording=False))], 0),
        ([layer(bitmap(inconsistent=True))], 0),
        ([layer(bitmap(persistent=False))], 0),
        ([layer(bitmap()), layer(bitmap(node="b", inconsistent=True), node="b")], 0),
        ([layer(bitmap()), layer(bitmap(node="b"), node="b", size=SIZE // 2)], 0),
    ],
    ids=[
        "one",
        "after-a-snapshot",
        "made-after-a-snapshot",
        "gap",
        "not-in-the-newest",
        "none",
        "no-image",
        "disabled",
        "inconsistent",
        "not-stored",
        "inconsistent-below",
        "resized-since-the-snapshot",
    ],
)
def test_only_bitmaps_without_a_gap_tell_what_changed(layers, count):
    assert len(off_checkpoints.recorded(layers, "c")) == count


def test_all_layers_are_united():
    add, merge = off_checkpoints.differential_bitmap([layer(bitmap()), BELOW], "c", "u")
    assert add["data"]["disabled"] is True
    assert merge["data"]["bitmaps"] == [{"node": "image0", "name": "c"}, {"node": "b", "name": "c"}]


def name(point):
    return checkpoints.checkpoint_name(OURS, point)


def noted(point):
    return Checkpoint(name(point), 0, {"vda": 0}, {"vda": ("/a",)})


def test_a_checkpoint_with_a_bitmap_below_the_newest_image_stays_until_the_domain_runs():
    found = (noted(A), noted(B))
    flat = {"vda": [layer(bitmap(name(A)), bitmap(name(B)))]}
    deep = {"vda": [layer(bitmap(name(A)), bitmap(name(B))), layer(bitmap(name(A), "b"), node="b")]}
    assert [one.checkpoint.name for one in off_checkpoints.plan(found, Facts(A, B), flat)] == [name(A)]
    assert off_checkpoints.plan(found, Facts(A, B), deep) == ()


def test_only_bitmaps_of_ours_without_a_checkpoint_are_unknown():
    there = [
        bitmap(one)
        for one in (name(A), name(B), name(C), "virtnbdbackup.0", "backupctl-99999999-20261121T000000Z")
    ]
    found = off_checkpoints.unknown((noted(A),), Facts(A, others=(C,)), {"vda": [layer(*there)]})
    assert [one.name for one in found] == [name(B)]


def test_libvirt_notes_a_checkpoint_before_its_bitmaps_are_made(monkeypatch):
    """A run that is killed in between leaves no bitmap that libvirt does not know of."""
    order = []
    monkeypatch.setattr(checkpoints, "listed", lambda *_, **__: ())
    monkeypatch.setattr(checkpoints, "redefine", lambda _, document: order.append(document))

    class Daemon:
        monitor = SimpleNamespace(transaction=order.append)

        @contextmanager
        def writable(self):
            yield

    described = SimpleNamespace(target="vda", files=("/a",))
    disks = off_images.OffDisks((), {DiskName("system"): described}, (("sda", "it is a cdrom"),))
    off = off_session.Off(SimpleNamespace, SimpleNamespace(), disks, Daemon())
    disk = Disk(DiskName("system"), NodeName("image0"), SIZE, "qcow2", True, "", "/a", ())
    snapshot = DiskSnapshot(disk, OURS.bitmap(B, DiskName("system")))
    off_session.OffSession(VmName("web"), off).hand_over([snapshot], Facts(A))
    document, actions = order
    assert f"<name>{name(B)}</name>" in document
    assert '<disk name="vda" checkpoint="bitmap" /><disk name="sda" checkpoint="no" />' in document
    assert [one["data"]["name"] for one in actions] == [name(B)]


DOMAIN = """<domain><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/top'/>
<backingStore type='file'><format type='raw'/><source file='/images/base'/></backingStore>
<target dev='vda'/></disk>
<disk type='file' device='cdrom'><target dev='sda'/></disk>{more}</devices></domain>"""


def of_domain(more="", **options):
    talk = SimpleNamespace(
        header=lambda _path: b"", domain=SimpleNamespace(XMLDesc=lambda: DOMAIN.format(more=more))
    )
    talk.call = lambda _name, function: function()
    return off_images.find(talk, VmConfig(VmName("web"), LibvirtAccess("qemu:///system", "web"), **options))


def test_the_images_and_their_formats_are_those_of_the_definition():
    found = of_domain(disk_names={"vda": "system"})
    files = (ImageFile(Path("/images/top"), "qcow2"), ImageFile(Path("/images/base"), "raw"))
    assert found.images == (VmImage(DiskName("system"), files),)
    assert found.target(DiskName("system")) == "vda"
    assert [target for target, _ in found.skipped] == ["sda"]


def test_an_image_that_is_configured_replaces_that_of_the_definition():
    mine = VmImage(DiskName("vda"), (ImageFile(Path("/mine")),))
    assert of_domain(images=(mine,)).images == (mine,)


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        ("<driver type='raw'/><source protocol='rbd' name='pool/b'/>", "neither a file nor a device"),
        ("<driver type='qcow2'/><source pool='default' volume='b'/>", "neither a file nor a device"),
        ("<driver type='vmdk'/><source file='/b'/>", "the format of /b is vmdk"),
        ("<source file='/b'/>", "the format of /b is not told by libvirt"),
    ],
)
def test_a_disk_that_cannot_be_read_without_its_qemu_is_refused(disk, words):
    with pytest.raises(Refused, match=words):
        of_domain(f"<disk type='x' device='disk'>{disk}<target dev='vdb'/></disk>")


def test_an_image_of_a_disk_that_the_domain_does_not_have_is_refused():
    mine = VmImage(DiskName("vdz"), (ImageFile(Path("/mine")),))
    with pytest.raises(Refused, match="has no disk vdz"):
        of_domain(images=(mine,))


SECOND = """<disk type='file' device='disk'><driver type='raw'/><source file='/b'/>
<target dev='vdb'/>{more}</disk>"""


@pytest.mark.parametrize(
    ("serial", "names", "words"),
    [
        ("", {"vda": "vdb"}, "two disks of the VM are both called vdb"),
        ("one", {"one": "vda"}, "two disks of the VM are both called vda"),
        ("", {"vdb": "../b"}, "give the disk a name"),
    ],
)
def test_a_disk_whose_name_cannot_be_is_refused_and_not_left_out(serial, names, words, monkeypatch):
    """Of the domain that runs as well; with --quiet nobody would see that it is in no point."""
    more = SECOND.format(more=f"<serial>{serial}</serial>")
    with pytest.raises(Refused, match=words):
        of_domain(more, disk_names=names)
    monkeypatch.setattr(checkpoints, "listed", lambda _talk: ())
    monkeypatch.setattr(job, "socket_of_job", lambda _talk: None)
    monkeypatch.setattr(domain, "describe", lambda _talk: domain.parsed(DOMAIN.format(more=more)))
    monkeypatch.setattr(domain, "disk", lambda _talk, _found, name, _bitmaps: SimpleNamespace(name=name))
    runs = SimpleNamespace(call=lambda *_: None, domain=SimpleNamespace(blockJobInfo=print))
    assert [one.name for one in inventory.inventory(runs, {}).disks] == ["vda", "vdb"]
    with pytest.raises(Refused, match=words):
        inventory.inventory(runs, names)
