# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints: which must go, which tell of a disk, and the documents around them."""

import subprocess
import tomllib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from backupctl.errors import Failed
from backupctl.names import Namespace, PointId
from backupctl.operations import discover
from backupctl.vm.libvirt import checkpoints, domain, recovery, run_directory, xml
from backupctl.vm.libvirt.checkpoints import Checkpoint

OURS = Namespace("0123abcd")
A, B, C, D = (PointId(f"2026112{number}T000000Z") for number in range(1, 5))


@dataclass
class Facts:
    """A repository that has committed these points."""

    committed: tuple[PointId, ...]
    kept: int = 0
    gone: tuple[PointId, ...] = ()
    namespace: Namespace = OURS
    others: tuple[PointId, ...] = field(default=())

    def is_committed(self, point):
        return point in self.committed

    def is_another_vms(self, point):
        return point in self.others

    def what_became_of(self, named):
        return {point: "is gone" for point in self.gone if point in named}

    def checkpoints(self):
        return self.kept

    def unfinished(self):
        return ()


def made(point, *disks, files=("/a",), size=0):
    name = checkpoints.checkpoint_name(OURS, point)
    targets = disks or ("vda",)
    return Checkpoint(name, 0, dict.fromkeys(targets, size), dict.fromkeys(targets, tuple(files)))


def going(found, facts):
    return [one.checkpoint.name for one in checkpoints.plan(found, facts)]


def name(point):
    return checkpoints.checkpoint_name(OURS, point)


def test_the_checkpoint_of_an_unfinished_run_goes_and_its_base_stays():
    assert going([made(A), made(B)], Facts((A,))) == [name(B)]


def test_a_committed_one_replaces_the_one_before():
    assert going([made(A), made(B)], Facts((A, B))) == [name(A)]


def test_one_that_is_the_newest_of_any_disk_stays():
    assert going([made(A, "vda", "vdb"), made(B, "vda")], Facts((A, B))) == []


def test_as_many_as_are_wanted_are_kept():
    found = [made(A), made(B), made(C), made(D)]
    assert going(found, Facts((A, B, C, D), kept=2)) == [name(A)]


def test_those_of_other_programs_repositories_and_vms_stay():
    others = [
        Checkpoint("virtnbdbackup.0", 0, {"vda": 0}, {}),
        Checkpoint(f"backupctl-ffffffff-{A}", 0, {"vda": 0}, {}),
        made(B),
    ]
    assert going(others, Facts((), others=(B,))) == []


def test_a_point_that_is_gone_is_called_so():
    (one,) = checkpoints.plan([made(A)], Facts((), gone=(A,)))
    assert "is gone" in one.planned


def test_a_bitmap_that_libvirt_can_not_use_is_inconsistent():
    document = (
        f"<domaincheckpoint><name>{name(A)}</name><description>"
        '{"backupctl": {"vda": ["/a"], "vdb": ["/b"]}}</description><creationTime>7</creationTime><disks>'
        "<disk name='vda' checkpoint='bitmap' size='65536'/><disk name='vdb' checkpoint='bitmap'/>"
        "<disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
    )
    found = checkpoints.parsed(document)
    (vda,) = checkpoints.bitmaps_of([found], "vda", "vda", ("/a",))
    (vdb,) = checkpoints.bitmaps_of([found], "vdb", "data", ("/b",))
    assert (vda.name, vda.dirty_bytes, vda.inconsistent) == (OURS.bitmap(A, "vda"), 65536, False)
    assert (vdb.name, vdb.inconsistent) == (OURS.bitmap(A, "data"), True)
    assert "vdc" not in found.sizes


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (("/a",), ("/a",), True),
        (("/a",), ("/overlay", "/a"), True),
        (("/overlay", "/a"), ("/a",), True),
        (("/a",), ("/b",), False),
        (("/a", "/template"), ("/b", "/template"), False),
        ((), ("/a",), False),
    ],
)
def test_a_bitmap_is_not_used_for_another_image(then, now, same):
    found = checkpoints.bitmaps_of([made(A, files=then)], "vda", "vda", now)
    assert bool(found) is same


def test_a_description_that_is_not_ours_tells_of_no_files():
    for text in ("", "[]", '{"backupctl": 7}', '{"backupctl": {"vda": 7}}', "{" * 5000):
        document = f"<domaincheckpoint><name>x</name><description>{text}</description></domaincheckpoint>"
        assert checkpoints.parsed(document).files == {}


def test_names_and_paths_are_escaped():
    document = xml.checkpoint("<&'", checkpoints.description({"vda": ["/a<b>&'\""]}), ["vda"], ["vd<"])
    found = checkpoints.parsed(document)
    assert (found.name, dict(found.files)) == ("<&'", {"vda": ("/a<b>&'\"",)})


def test_a_document_that_is_huge_or_none_is_refused(monkeypatch):
    with pytest.raises(Failed, match="invalid XML"):
        xml.parse("<domain>")
    monkeypatch.setattr(xml, "MAX_BYTES", 10)
    with pytest.raises(Failed, match="characters"):
        xml.parse("<domain>          </domain>")


def test_a_socket_is_ours_by_its_directory():
    is_ours = recovery.owns(Facts(()), "web")
    assert is_ours("/var/tmp/backupctl-0123abcd-web@x1y2/nbd/s")
    assert not is_ours("/var/tmp/backupctl-0123abcd-web2@x1y2/nbd/s")
    assert not is_ours("/var/tmp/backupctl-ffffffff-web@x1y2/nbd/s")


DOMAIN = """
<domain><devices>
<disk type='file' device='disk'><driver type='qcow2' error_policy='report' iothread='1'/><source file='/a'/>
 <backingStore type='file'><source file='/t'/><backingStore/></backingStore><target dev='vda'/>
 <alias name='virtio-disk0'/><serial>S1</serial></disk>
<disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='p/i'/>
 <target dev='vdb'/></disk>
<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>
<disk type='file' device='disk'><source file='/x'/><target dev='vdc'/><transient/></disk>
</devices><seclabel model='dac'><label>+64055:+108</label></seclabel>
<seclabel model='apparmor'><label>x</label></seclabel></domain>
"""


def test_what_a_domain_is_told_by():
    found = domain.parsed(DOMAIN)
    vda, vdb, cdrom, transient = found.disks
    assert (vda.files, vda.names, vda.iothread, vda.pauses) == (
        ("/a", "/t"),
        ("vda", "virtio-disk0", "S1"),
        True,
        False,
    )
    assert (vdb.files, vdb.records, vdb.pauses) == (("rbd:///p/i",), False, True)
    assert "cdrom" in cdrom.why_not
    assert "transient" in transient.why_not
    assert (found.qemu_user, found.security) == ((64055, 108), ("apparmor",))
    assert vda.stored_name({"S1": "system"}) == "system"


HERE = SimpleNamespace(header=run_directory.header)


@pytest.mark.parametrize(
    ("options", "records", "apart"),
    [("compat=1.1", True, False), ("compat=0.10", False, False), ("data_file={}/data", True, True)],
)
def test_what_only_the_header_of_an_image_tells(tmp_path, options, records, apart):
    path = tmp_path / "vda.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options.format(tmp_path), path, "1M"]
    subprocess.run(command, check=True)
    (made,) = domain.parsed(DOMAIN.replace("'/a'", f"'{path}'")).disks[:1]
    found = domain._looked_at(made, HERE)
    assert (found.records, found.apart) == (records, apart)


def test_an_image_that_can_not_be_read_is_taken_for_a_usual_one():
    (made,) = domain.parsed(DOMAIN).disks[:1]
    assert domain._looked_at(made, HERE).records


@dataclass
class Host:
    """A libvirt's domains."""

    names: list[tuple[str, bool]]


def test_domains_that_are_not_configured_get_names_of_their_own(monkeypatch):
    host = Host([("a b", True), ("a_b", False), ("web", True), ('"', True)])
    monkeypatch.setattr(discover, "domains", lambda _uri, _timeouts: host.names)
    found = discover.discover("qemu:///system", [], {("qemu:///system", "web"): ("a_b",)})
    made = tomllib.loads(discover.configuration_of("qemu:///system", found))["vm"]
    assert {name: one.get("domain", name) for name, one in made.items()} == {
        "a_b-2": "a b",
        "a_b-3": "a_b",
        "vm-_": '"',
    }
    assert [one.domain for one in discover.discover("qemu:///system", ["w*"], {})] == ["web"]
