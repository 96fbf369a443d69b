# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM is beside its disks: what QEMU answers, its command line without secrets, files of the host."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from backupctl.errors import CommandFailed, OutcomeUnknown, UsageError
from backupctl.sizes import MAX_INCLUDED_FILES
from backupctl.system import bounded_read
from backupctl.vm import definition as definitions
from backupctl.vm.qmp import command_line, definition

ANSWERS = {
    "query-name": {"name": "web"},
    "query-uuid": {"UUID": "11111111-2222-3333-4444-555555555555"},
    "query-target": {"arch": "x86_64"},
    "query-kvm": {"enabled": True, "present": True},
    "query-memory-size-summary": {"base-memory": 1 << 30, "plugged-memory": 1 << 20},
    "query-cpus-fast": [{"cpu-index": 0}, {"cpu-index": 1}],
    "qom-get": "pc-q35-7.2-machine",
    "qom-list": [{"name": "vda", "type": "child<virtio-blk-pci>"}, {"name": "type", "type": "string"}],
    "query-block": [
        {"device": "", "qdev": "vda", "inserted": {"node-name": "n", "drv": "qcow2", "file": "/f"}}
    ],
    "query-chardev": [{"label": "ga", "filename": "unix:/ga"}],
}


class Monitor:
    def __init__(self, answers):
        self.answers = answers
        self.commands = frozenset(answers)
        self.version = "7.2.22"

    def execute(self, command, _arguments=None):
        answer = self.answers[command]
        if isinstance(answer, Exception):
            raise answer
        return answer


def document(answers, arguments=None):
    found = definition.definition(Monitor(answers), arguments)
    assert found.omitted == ()
    return json.loads(found.files[0].content)


def test_all_that_qemu_tells_is_in_one_document():
    found = document(ANSWERS, ["qemu-system-x86_64", "-m", "1G"])
    assert found == {
        "format": 1,
        "qemu": "7.2.22",
        "name": "web",
        "uuid": "11111111-2222-3333-4444-555555555555",
        "target": "x86_64",
        "kvm": True,
        "memory_bytes": (1 << 30) + (1 << 20),
        "cpus": 2,
        "machine": "pc-q35-7.2-machine",
        "devices": [{"name": "vda", "type": "child<virtio-blk-pci>"}],
        "other_devices": [{"name": "vda", "type": "child<virtio-blk-pci>"}],
        "block": [
            {
                "device": "",
                "qdev": "vda",
                "node": "n",
                "driver": "qcow2",
                "file": "/f",
                "read_only": False,
                "size": 0,
            }
        ],
        "chardevs": [{"label": "ga", "to": "unix:/ga"}],
        "command_line": ["qemu-system-x86_64", "-m", "1G"],
        "secrets_hidden": False,
        "omitted": [],
    }


@pytest.mark.parametrize("command", sorted(ANSWERS))
@pytest.mark.parametrize(
    "answer", ["missing", CommandFailed("c", "GenericError", "no"), None, 7, [7], "\ud800", {"a": 1}, [None]]
)
def test_a_question_without_a_good_answer_leaves_its_part_out_and_never_fails(command, answer):
    answers = {**ANSWERS, command: answer}
    if answer == "missing":
        del answers[command]
    found = document(answers)
    assert found["omitted"] or command in (
        "query-name",
        "query-block",
        "qom-get",
        "query-chardev",
        "qom-list",
    )
    assert found["qemu"] == "7.2.22"


def test_a_monitor_that_is_lost_is_no_missing_part():
    with pytest.raises(OutcomeUnknown):
        document({**ANSWERS, "query-uuid": OutcomeUnknown("query-uuid", "silent")})


def test_an_answer_of_absurd_size_is_left_out_and_said():
    many = [{"label": "x" * 4000, "filename": "y" * 4000}] * 1000
    found = definition.definition(Monitor({**ANSWERS, "query-chardev": many}), None)
    assert found.files == ()
    assert "larger than" in found.omitted[0]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("secret,id=s0,data=hunter2", "secret,id=s0,data=***"),
        ("secret,id=s0,file=/etc/key", "secret,id=s0,file=/etc/key"),
        ("qom-type=secret,id=s0,data=hunter2", "qom-type=secret,id=s0,data=***"),
        ("port=5900,password=hunter,,2,ipv4=on", "port=5900,password=***,ipv4=on"),
        ("vnc=:0,password-secret=s0", "vnc=:0,password-secret=s0"),
        ("file=rbd:pool/img:id=admin:key=AQB==:mon_host=h", "file=rbd:pool/img:id=admin:key=***:mon_host=h"),
        ("file=http://me:hunter2@host/img", "file=http://***@host/img"),
        (
            "type=11,value=io.systemd.credential:passwd=hunter2",
            "type=11,value=io.systemd.credential:passwd=***",
        ),
        ("root=/dev/vda1 luks.password=hunter2 quiet", "root=/dev/vda1 luks.password=*** quiet"),
        (
            '{"qom-type": "secret", "id": "s0", "data": "hunter2"}',
            '{"qom-type": "secret", "id": "s0", "data": "***"}',
        ),
        ('{"driver": "ssh", "password": "hunter2"}', '{"driver": "ssh", "password": "***"}'),
        ('{"driver": "luks", "key-secret": "s0"}', '{"driver": "luks", "key-secret": "s0"}'),
        ('json:{"a": {"cookie": "hunter2"}}', 'json:{"a": {"cookie": "***"}}'),
        ("{hunter2", "***"),
        ("q35,accel=kvm", "q35,accel=kvm"),
        ("unix:/run/web.qmp,server=on,wait=off", "unix:/run/web.qmp,server=on,wait=off"),
        ("console=ttyS0 quiet panic=-1", "console=ttyS0 quiet panic=-1"),
    ],
)
def test_no_secret_of_the_command_line_is_stored(given, stored):
    assert command_line.clean(given) == stored
    found = document(ANSWERS, ["qemu", given])
    assert found["command_line"][1] == stored
    assert found["secrets_hidden"] == (given != stored)


def test_named_files_are_read_once_each_and_get_names_that_a_point_can_hold(tmp_path):
    for name in ("a b.xml", "c"):
        (tmp_path / name).write_text(name)
    paths = [tmp_path / "a b.xml", tmp_path / "c", tmp_path / "a b.xml"]
    found = definitions.included(paths, bounded_read.read)
    assert [(one.name, one.origin, one.content) for one in found.files] == [
        ("included-1-a-b.xml", str(tmp_path / "a b.xml"), b"a b.xml"),
        ("included-2-c", str(tmp_path / "c"), b"c"),
    ]


def test_a_named_file_that_is_missing_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(UsageError, match=r"cannot open .*missing: No such file"):
        definitions.included([tmp_path / "missing"], bounded_read.read)


def test_too_many_or_too_large_files_are_refused_before_all_are_in_memory():
    with pytest.raises(UsageError, match="at most"):
        definitions.included([Path(f"/{number}") for number in range(MAX_INCLUDED_FILES + 1)], lambda *_: b"")
    read = SimpleNamespace(count=0)

    def large(_path, most):
        read.count += 1
        return bytes(most)

    with pytest.raises(UsageError, match="larger than 160 MiB"):
        definitions.included([Path(f"/{number}") for number in range(60)], large)
    assert read.count == 3
