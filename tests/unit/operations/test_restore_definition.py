# SPDX-License-Identifier: GPL-2.0-or-later
"""What describes a VM comes back as it was stored, and a domain is defined last or not at all."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
from click.testing import CliRunner

from backupctl.cancel import Cancellation
from backupctl.cli.main import cli
from backupctl.errors import CommandFailed, DamageFound, Failed, TargetExists, UsageError
from backupctl.operations.restore import define, definition
from backupctl.operations.restore.define import DefineRequest
from backupctl.operations.restore.request import RestoreRequest
from backupctl.options import Timeouts
from backupctl.progress import Silent
from backupctl.repository import stored_files
from backupctl.repository.stored_files import NewFile
from backupctl.vm import define as domains
from tests.unit.points import P1, Builder, die_at, disk_entry

XML = b"""<domain><name>web</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
<os><nvram>/old/vars.fd</nvram></os>
<devices><disk type='file' device='disk'><source file='/old/a.qcow2'/><target dev='vda'/></disk></devices>
</domain>
"""
FILES = (
    NewFile("domain.xml", "domain", "", XML),
    NewFile("variables.fd", "variables", "/old/vars.fd", b"vars" * 100),
    NewFile("included-1-web.sh", "included", "/etc/web.sh", b"#!/bin/sh\n"),
)


def point(builder: Builder, files=FILES) -> Builder:
    """A point whose disk is stored as "system" and is vda in the VM, with these files."""
    entry = replace(disk_entry("system"), node="vda")
    made = builder.point(P1, (entry, [(0, b"x" * 70_000)]))
    manifest = replace(made.manifest, definition=stored_files.write(made.path, files))
    (made.path / "manifest.json").write_bytes(manifest.to_json())
    return builder


def request(builder: Builder, to, **more) -> RestoreRequest:
    return RestoreRequest(directory=builder.directory, point=P1, to=str(to), **more)


class Libvirt:
    """What libvirt was asked, and how it answers."""

    def __init__(self, names=(), error=None):
        self.names, self.error, self.defined = set(names), error, []
        self.handle = self

    def lookupByName(self, name):  # noqa: N802 - libvirt's name
        if name not in self.names:
            raise CommandFailed("virDomainLookupByName", "42", "not found")

    def lookupByUUIDString(self, _uuid):  # noqa: N802 - libvirt's name
        raise CommandFailed("virDomainLookupByUUIDString", "42", "not found")

    def defineXML(self, document):  # noqa: N802 - libvirt's name
        if self.error:
            raise self.error
        self.defined.append(document)

    def call(self, _name, function):
        return function()


@pytest.fixture
def libvirt(monkeypatch) -> Libvirt:
    found = Libvirt()

    @contextmanager
    def connected(_uri, _seconds):
        yield found

    monkeypatch.setattr(domains, "connected", connected)
    return found


def defined(builder: Builder, to, **more):
    asked = {"uri": "qemu:///system", "name": "", "keep_identity": False, "timeouts": Timeouts()}
    return define.restore(request(builder, to), DefineRequest(**{**asked, **more}), Silent(), Cancellation())


def test_all_files_are_restored_beside_the_disks(builder: Builder, tmp_path):
    point(builder)
    (tmp_path / "to").mkdir()
    found = definition.restore(request(builder, tmp_path / "to"), Silent())
    assert [(one.path.name, one.path.read_bytes()) for one in found] == [
        (one.name, one.content) for one in FILES
    ]
    assert {one.path.parent for one in found} == {tmp_path / "to/definition"}
    assert (tmp_path / "to/definition/domain.xml").stat().st_mode & 0o777 == 0o600


def test_what_exists_is_replaced_only_by_force(builder: Builder, tmp_path):
    point(builder)
    (tmp_path / "to/definition").mkdir(parents=True)
    (tmp_path / "to/definition/domain.xml").write_text("mine")
    with pytest.raises(TargetExists):
        definition.refuse(request(builder, tmp_path / "to"))
    with pytest.raises(TargetExists):
        definition.restore(request(builder, tmp_path / "to"), Silent())
    assert (tmp_path / "to/definition/domain.xml").read_text() == "mine"
    definition.restore(request(builder, tmp_path / "to", overwrite=True), Silent())
    assert (tmp_path / "to/definition/domain.xml").read_bytes() == XML


def test_a_damaged_file_is_never_restored_or_printed(builder: Builder, tmp_path):
    point(builder)
    (tmp_path / "to").mkdir()
    (builder.directory.path / P1 / "definition/domain.xml").write_bytes(XML.replace(b"old", b"new"))
    with pytest.raises(DamageFound):
        definition.restore(request(builder, tmp_path / "to"), Silent())
    with pytest.raises(DamageFound):
        definition.main_file(builder.directory, builder.directory.point(P1))
    assert not (tmp_path / "to/definition/domain.xml").exists()


@pytest.mark.parametrize("to", ["-", "x.qcow2"])
def test_files_need_a_directory(builder: Builder, tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="directory"):
        definition.refuse(request(point(builder), to))


def test_a_point_of_an_older_version_says_that_it_has_none(builder: Builder, tmp_path, libvirt):
    point(builder, ())
    for ask in (
        lambda: definition.refuse(request(builder, tmp_path / "to")),
        lambda: definition.main_file(builder.directory, builder.directory.point(P1)),
        lambda: defined(builder, tmp_path / "to"),
    ):
        with pytest.raises(UsageError, match="no definition") as caught:
            ask()
        assert caught.value.next_command == "backupctl list vm1"
        assert "older version" in caught.value.hint
    assert libvirt.defined == []


def test_a_vm_of_plain_qemu_is_not_defined_and_the_error_leads_to_its_command_line(
    builder: Builder, tmp_path, libvirt
):
    point(builder, (NewFile("qemu.json", "qemu", "", b"{}"),))
    with pytest.raises(UsageError, match="was not a domain of libvirt") as caught:
        defined(builder, tmp_path / "to")
    assert caught.value.next_command == f"backupctl show vm1 {P1} --definition"
    assert libvirt.defined == []


def test_qemu_s_user_can_enter_a_new_directory_whatever_the_umask_is(builder, tmp_path, libvirt):
    before = os.umask(0o077)  # as the command line sets it
    try:
        defined(point(builder), tmp_path / "to")
    finally:
        os.umask(before)
    assert len(libvirt.defined) == 1
    assert (tmp_path / "to").stat().st_mode & 0o777 == 0o711


def test_the_domain_uses_the_restored_files_by_the_names_that_its_disks_have(builder, tmp_path, libvirt):
    report = defined(point(builder), tmp_path / "to", name="web2")
    (document,) = libvirt.defined
    assert f'<source file="{tmp_path}/to/system.qcow2" />' in document
    assert f"<nvram>{tmp_path}/to/variables.fd</nvram>" in document
    assert "<name>web2</name>" in document
    assert "/old/" not in document
    assert (tmp_path / "to/variables.fd").read_bytes() == FILES[1].content
    assert (tmp_path / "to/domain.xml").read_text() == document
    assert (report.domain, report.variables) == ("web2", tmp_path / "to/variables.fd")


def test_a_domain_that_exists_is_refused_before_a_byte_is_written(builder, tmp_path, libvirt):
    libvirt.names.add("web")
    with pytest.raises(TargetExists, match="already"):
        defined(point(builder), tmp_path / "to")
    assert libvirt.defined == []
    assert not (tmp_path / "to").exists()


def test_a_libvirt_that_refuses_leaves_the_files_and_says_how_to_go_on(builder, tmp_path, libvirt):
    libvirt.error = CommandFailed("virDomainDefineXML", "67", "unsupported configuration")
    with pytest.raises(Failed, match="unsupported") as caught:
        defined(point(builder), tmp_path / "to")
    assert caught.value.next_command == f"virsh -c qemu:///system define {tmp_path}/to/domain.xml"
    assert "no domain was defined" in caught.value.state
    assert (tmp_path / "to/system.qcow2").exists()


@pytest.mark.parametrize("more", [{"disk": "system"}, {"to": "-"}, {"to": "x.raw"}])
def test_only_whole_restores_to_a_directory_can_be_defined(builder, tmp_path, libvirt, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    wanted = replace(request(point(builder), "to/"), **more)
    with pytest.raises(UsageError):
        define.restore(
            wanted, DefineRequest("qemu:///system", "", False, Timeouts()), Silent(), Cancellation()
        )
    assert libvirt.defined == []
    assert not (tmp_path / "to").exists()


def test_a_restore_killed_at_any_step_before_the_end_has_defined_nothing(builder, tmp_path, libvirt):
    point(builder)
    told = tmp_path / "told"

    def work():
        libvirt.defineXML = lambda document: told.write_text(
            json.dumps([os.path.exists(path) for path in paths(document)])
        )
        defined(builder, tmp_path / "to")

    def paths(_document):
        return [tmp_path / "to" / name for name in ("system.qcow2", "variables.fd", "domain.xml")]

    number, before = 0, 0
    while not (ended := die_at(number, work)):
        if told.exists():
            break
        before += 1
        number += 7
        for path in paths(""):
            path.unlink(missing_ok=True)
    assert told.exists()
    assert ended or json.loads(told.read_text() or "[true]") == [True, True, True]
    assert before > 3


def call(*words: str):
    return CliRunner().invoke(cli, [*words], standalone_mode=False)


def test_show_prints_the_stored_text_as_it_is_and_lists_the_files(builder: Builder):
    point(builder)
    where = ("--repository", str(builder.repository.path))
    done = call("show", "vm1", "latest", "--definition", *where)
    assert done.stdout_bytes == XML
    listed = json.loads(call("show", "vm1", "latest", "--json", *where).stdout)["definition"]
    assert [(one["name"], one["kind"], one["origin"]) for one in listed] == [
        (one.name, one.kind, one.origin) for one in FILES
    ]
    assert "/etc/web.sh" in call("show", "vm1", "latest", *where).stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--define", "--thin"),
        ("--define", "--only-changed"),
        ("--keep-identity",),
        ("--define", "--disk", "system"),
    ],
)
def test_options_that_do_not_go_together_are_refused(builder: Builder, tmp_path, words):
    point(builder)
    where = ("--repository", str(builder.repository.path), "--to", f"{tmp_path}/to/")
    done = call("restore", "vm1", *words, *where)
    assert isinstance(done.exception, UsageError)
    assert not (tmp_path / "to").exists()
