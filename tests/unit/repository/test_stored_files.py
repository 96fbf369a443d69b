# SPDX-License-Identifier: GPL-2.0-or-later
"""The files that describe a VM, in a point: how they are stored, committed, read back and verified."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import BackupctlError, DamageFound, RepositoryError
from backupctl.names import file_name, safe_file_name
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import verify
from backupctl.progress import Silent
from backupctl.repository import stored_files, strict_json
from backupctl.repository.manifest import Manifest
from backupctl.repository.point import Point
from backupctl.repository.stored_files import NewFile
from tests.unit.points import P1, P2, Builder, die_at, disk_entry

DOMAIN = NewFile("domain.xml", "domain", "", b"<domain/>")
VARIABLES = NewFile("variables.fd", "variables", "/var/lib/libvirt/qemu/nvram/web.fd", bytes(range(256)))
FILES = (DOMAIN, VARIABLES)


def commit(builder: Builder, files=FILES, point=P1) -> Point:
    partial = builder.begin(point)
    for end in ("qcow2", "digests"):
        (partial.path / f"vda.{end}").write_bytes(b"")
    manifest = builder.manifest(point, disk_entry("vda"))
    return partial.commit(replace(manifest, definition=partial.store(files)))


def test_what_is_stored_is_read_back_and_only_root_may_read_it(builder: Builder):
    point = commit(builder)
    found = builder.directory.point(P1).manifest.definition
    assert [stored_files.read(point.path, one) for one in found] == [one.content for one in FILES]
    assert [(one.name, one.kind, one.origin, one.size) for one in found] == [
        ("domain.xml", "domain", "", 9),
        ("variables.fd", "variables", VARIABLES.origin, 256),
    ]
    assert (point.path / "definition").stat().st_mode & 0o777 == 0o700
    assert (point.path / "definition/domain.xml").stat().st_mode & 0o777 == 0o600


def test_a_point_without_a_definition_is_written_as_older_programs_expect(builder: Builder):
    assert commit(builder, ()).manifest.format == 1
    content = json.loads((builder.directory.path / P1 / "manifest.json").read_text())
    assert "definition" not in content
    assert not (builder.directory.path / P1 / "definition").exists()


def test_a_point_with_a_definition_has_a_format_that_older_programs_do_not_take_for_damaged(builder: Builder):
    manifest = commit(builder).manifest
    assert manifest.format == 3
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../domain.xml"},
        {"name": "a/b"},
        {"name": ".hidden"},
        {"name": ""},
        {"name": "x.partial"},
        {"kind": "anything"},
        {"size": -1},
        {"size": (64 << 20) + 1},
        {"digest": "x"},
        {"origin": "x\0"},
        {"new": 1},
    ],
)
def test_a_hostile_entry_in_a_manifest_is_refused(builder: Builder, changes):
    document = commit(builder).manifest.to_dict()
    document["definition"] = [{**document["definition"][0], **changes}]
    document["checksum"] = strict_json.checksum(document)
    with pytest.raises(BackupctlError):
        Manifest.from_json(json.dumps(document).encode())


@pytest.mark.parametrize("entries", ["none", "twice", "many", "large"])
def test_a_hostile_list_in_a_manifest_is_refused(builder: Builder, entries):
    document = commit(builder).manifest.to_dict()
    one = document["definition"][0]
    many = [{**one, "name": f"file-{number}"} for number in range(101)]
    large = [{**one, "name": f"file-{number}", "size": 64 << 20} for number in range(5)]
    lists = {"none": [], "twice": [one, one], "many": many, "large": large}
    document["definition"] = lists[entries]
    document["checksum"] = strict_json.checksum(document)
    with pytest.raises(DamageFound):
        Manifest.from_json(json.dumps(document).encode())


def test_two_files_of_one_name_fail_the_run_before_the_commit(builder: Builder):
    with pytest.raises(RepositoryError, match="one of them twice"):
        builder.begin(P1).store((DOMAIN, DOMAIN))


def test_all_files_are_durable_before_the_manifest(builder: Builder, monkeypatch):
    done = []
    real = os.fsync

    def sync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    commit(builder)
    last = done[: done.index("manifest.json")][-3:]
    assert last == ["domain.xml", "variables.fd", "definition"]


def test_a_crash_at_any_step_leaves_a_point_with_its_definition_or_a_partial(builder: Builder):
    commit(builder, (), P1)
    number, committed = 0, []
    while True:
        ended = die_at(number, lambda: commit(builder, FILES, P2))
        with builder.directory.lock():
            committed.append(builder.directory.is_committed(P2))
            if committed[-1]:
                point = builder.directory.point(P2)
                for one, entry in zip(FILES, point.manifest.definition, strict=True):
                    assert stored_files.read(point.path, entry) == one.content
                point.path.rename(builder.directory.path / f"{P2}.partial")
            for partial in builder.directory.pending_points():
                partial.drop()
            assert sorted(os.listdir(builder.directory.path)) == [P1, "history", "lock"]
        if ended:
            break
        number += 1
    assert committed == sorted(committed)
    assert True in committed[:-1]


def changed(path: Path) -> None:
    path.write_bytes(b"<domain!>")


def shorter(path: Path) -> None:
    path.write_bytes(b"<")


def longer(path: Path) -> None:
    path.write_bytes(b"<domain/> ")


def a_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_linked_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("other"))
    path.parent.symlink_to("other")


@pytest.mark.parametrize("how", [changed, shorter, longer, Path.unlink, a_link, a_pipe, a_linked_directory])
def test_verify_finds_a_file_that_is_not_as_it_was_stored(builder: Builder, how):
    builder.point(P1, (disk_entry(), [(0, b"a" * 70_000)]))
    whole = builder.directory.point(P1)
    stored = stored_files.write(whole.path, FILES)
    manifest = replace(whole.manifest, definition=stored)
    (whole.path / "manifest.json").write_bytes(manifest.to_json())
    (builder.directory.path / "history").unlink()

    def find():
        scope = VerifyScope(data=False)
        return verify(
            builder.repository, builder.directory.name, None, scope, Silent(), Cancellation()
        ).damage

    assert find() == ()
    how(whole.path / "definition/domain.xml")
    found = find()
    assert ("definition", whole.path / "definition/domain.xml") in [(one.kind, one.path) for one in found]
    with pytest.raises(DamageFound):
        stored_files.read(whole.path, stored[0])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("web.xml", "web.xml"),
        (".hidden", "hidden"),
        ("..", "file"),
        ("", "file"),
        ("a b/c\n", "a-b-c-"),
        ("x.partial", "x.partial-"),
        ("é" * 300, "-" * 80),
        ("lost+found", "lost+found-"),
    ],
)
def test_any_name_becomes_one_that_a_point_can_hold(text, name):
    if name.startswith("-"):
        name = "file"
    assert safe_file_name(text) == name
    assert file_name(f"included-1-{safe_file_name(text)}")
    assert file_name(safe_file_name(text))
