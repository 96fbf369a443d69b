# SPDX-License-Identifier: GPL-2.0-or-later
"""A stored domain becomes a new one: other disks, another identity, no files of the old host."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from backupctl.errors import CommandFailed, Failed, OutcomeUnknown, TargetExists
from backupctl.vm import define
from backupctl.vm.define import Changes, NewDisk
from backupctl.vm.libvirt import definition, xml
from backupctl.vm.qmp.files import LOCAL

STORED = """\
<domain type='kvm' id='7'>
  <name>web</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <genid>99999999-2222-3333-4444-555555555555</genid>
  <sysinfo type='smbios'><system>
    <entry name='uuid'>11111111-2222-3333-4444-555555555555</entry>
  </system></sysinfo>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>
  </os>
  <devices>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' cache='none' iothread='1'/>
      <source dev='/dev/vg/web'><encryption format='luks'/></source>
      <backingStore type='file'><source file='/old/base.qcow2'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='network' device='disk'>
      <auth username='admin'><secret type='ceph' uuid='1'/></auth>
      <source protocol='rbd' name='pool/img'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/ro'/><target dev='vdc'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
  </devices>
</domain>
"""
DISKS = {"vda": NewDisk(Path("/srv/vda.qcow2"), "qcow2"), "vdb": NewDisk(Path("/srv/vdb.raw"), "raw")}


def made(document=STORED, **changes):
    given = {"name": "", "disks": DISKS, "variables": Path("/srv/variables.fd"), "keep_identity": False}
    found = define.rewritten(document, Changes(**{**given, **changes}))
    return found, xml.parse(found.document)


def test_every_disk_uses_its_restored_image_and_nothing_of_its_old_chain():
    _, root = made()
    first, second, *_ = root.findall("devices/disk")
    for disk, path, kind in ((first, "/srv/vda.qcow2", "qcow2"), (second, "/srv/vdb.raw", "raw")):
        assert disk.get("type") == "file"
        assert [one.attrib for one in disk.findall("source")] == [{"file": path}]
        assert disk.find("driver").get("type") == kind
        assert not [
            one.tag for one in disk.iter() if one.tag in ("backingStore", "encryption", "auth", "secret")
        ]
    assert first.find("driver").get("cache") == "none"


def test_the_new_domain_has_an_identity_of_its_own():
    found, root = made(name="web2")
    assert (found.name, root.get("id")) == ("web2", None)
    assert found.uuid not in ("", "11111111-2222-3333-4444-555555555555")
    assert root.findtext("sysinfo/system/entry") == found.uuid
    assert root.findtext("genid") != "99999999-2222-3333-4444-555555555555"
    assert root.find("devices/interface/mac") is None


def test_the_identity_stays_if_it_is_asked_for():
    found, root = made(keep_identity=True)
    assert (found.name, found.uuid) == ("web", "11111111-2222-3333-4444-555555555555")
    assert root.find("devices/interface/mac").get("address") == "52:54:00:00:00:01"


def test_uefi_variables_are_the_restored_ones_or_new_ones():
    found, root = made()
    assert root.findtext("os/nvram") == "/srv/variables.fd"
    assert not any("UEFI" in note for note in found.notes)
    found, root = made(variables=None)
    assert root.find("os/nvram").text is None
    assert any("libvirt makes new ones" in note for note in found.notes)
    by_source = STORED.replace(
        ">/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>", " type='file'><source file='/v'/></nvram>"
    )
    _, root = made(by_source)
    nvram = root.find("os/nvram")
    assert (nvram.text, nvram.get("type"), nvram.find("source")) == ("/srv/variables.fd", None, None)


def test_what_cannot_be_restored_is_told():
    found, root = made()
    assert root.find("devices/disk[@device='cdrom']/source") is None
    assert [note.split(":")[0] for note in found.notes] == [
        "the drive sda is empty",
        "the disk vdc was not restored",
        "the state of its TPM is not restored by itself",
    ]


@pytest.mark.parametrize(
    "document",
    ["", "<domain/>", "<domain><name> </name></domain>", "<network><name>x</name></network>", "<a"],
)
def test_what_is_not_a_domain_is_refused(document):
    with pytest.raises(Failed):
        made(document)


class Connection:
    """Answers as libvirt does for names and UUIDs that it knows or does not know."""

    def __init__(self, known=(), error=None):
        self.known, self.error = known, error
        self.handle = SimpleNamespace(lookupByName=self.look, lookupByUUIDString=self.look)

    def look(self, name):
        if self.error:
            raise self.error
        if name not in self.known:
            raise CommandFailed("lookup", "42", "Domain not found")
        return name

    def call(self, _name, function):
        return function()


def test_a_domain_of_that_name_or_uuid_is_never_replaced():
    found, _ = made(keep_identity=True)
    define.refuse_existing(Connection(), found)
    with pytest.raises(TargetExists) as caught:
        define.refuse_existing(Connection({"web"}), found)
    assert caught.value.next_command == "backupctl restore --domain web-restored"
    with pytest.raises(TargetExists, match="UUID"):
        define.refuse_existing(Connection({found.uuid}), found)
    for error in (CommandFailed("lookup", "1", "internal error"), OutcomeUnknown("lookup", "time-out")):
        with pytest.raises(type(error)):
            define.refuse_existing(Connection(error=error), found)


@pytest.mark.parametrize(
    ("nvram", "path"),
    [
        ("<nvram>/v</nvram>", "/v"),
        ("<nvram template='/t'> /v </nvram>", "/v"),
        ("<nvram type='file'><source file='/v'/></nvram>", "/v"),
        ("<nvram type='network'><source protocol='iscsi' name='x'/></nvram>", ""),
        ("<nvram type='block'><source dev='/dev/x'/></nvram>", ""),
        ("<nvram/>", ""),
        ("<nvram>relative</nvram>", ""),
        ("", ""),
    ],
)
def test_where_uefi_variables_are(nvram, path):
    root = xml.parse(f"<domain><os>{nvram}</os></domain>")
    assert definition.variables_path(root) == path


class Domain:
    def __init__(self, document):
        self.document = document

    def XMLDesc(self, _flags=0):  # noqa: N802 - libvirt's name
        return self.document


def asked(document):
    return SimpleNamespace(domain=Domain(document), call=lambda _name, function: function())


def test_state_files_are_read_and_what_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(definition, "_SWTPM", tmp_path)
    (tmp_path / "v.fd").write_bytes(b"vars")
    state = tmp_path / "11111111-2222-3333-4444-555555555555/tpm2"
    state.mkdir(parents=True)
    (state / "tpm2-00.permall").write_bytes(b"tpm")
    (state / ".lock").write_bytes(b"")
    document = STORED.replace("/var/lib/libvirt/qemu/nvram/web_VARS.fd", str(tmp_path / "v.fd"))
    found = definition.state_files(asked(document), LOCAL, firmware=True)
    assert [(one.kind, one.name, one.content) for one in found.files] == [
        ("variables", "variables.fd", b"vars"),
        ("tpm", "tpm-tpm2-00.permall", b"tpm"),
    ]
    assert found.omitted == ()
    assert [one.kind for one in definition.state_files(asked(document), LOCAL, firmware=False).files] == [
        "tpm"
    ]
    (tmp_path / "v.fd").unlink()
    (tmp_path / "v.fd").symlink_to("/etc/shadow")
    (state / "tpm2-00.permall").unlink()
    state.joinpath(".lock").unlink()
    state.rmdir()
    found = definition.state_files(asked(document), LOCAL, firmware=True)
    assert found.files == ()
    assert ["not a regular file" in found.omitted[0], "the state of the TPM" in found.omitted[1]] == [
        True,
        True,
    ]


def test_a_uuid_that_leads_elsewhere_is_not_followed(tmp_path):
    document = STORED.replace("<uuid>11111111-2222-3333-4444-555555555555</uuid>", "<uuid>../../etc</uuid>")
    found = definition.state_files(asked(document), LOCAL, firmware=False)
    assert found.files == ()
    assert "TPM" in found.omitted[0]
