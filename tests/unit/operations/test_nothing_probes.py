# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing ever probes a format: a guest that writes a qcow2 header onto its raw disk gets nowhere with it."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import BackupctlError, TargetExists, UsageError
from backupctl.images import foreign_header
from backupctl.operations import serve
from backupctl.operations.prune.retention import Rules
from backupctl.operations.prune.run import prune
from backupctl.operations.restore import in_place, whole
from backupctl.operations.restore import overlay as thin
from backupctl.operations.restore.request import RestoreRequest
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import verify
from backupctl.progress import Silent
from tests.unit.operations.test_restore_whole import as_raw
from tests.unit.points import P1, P2, Builder, disk_entry

SIZE = 1 << 20
NAMES = ["disk.0", "web", "disk", "disk.img", "disk.qcow2", "disk.raw"]
PRECIOUS = b"root:x:0:0:" * 1000


@dataclass
class Attack:
    """A raw disk that begins as a qcow2 whose data is in `victim`, a file of the host."""

    builder: Builder
    directory: Path
    victim: Path
    hostile: bytes
    content: bytes

    def disk(self, name: str) -> Path:
        path = self.directory / name
        path.write_bytes(self.hostile)
        return path

    def unharmed(self) -> bool:
        return self.victim.read_bytes() == PRECIOUS and self.victim.stat().st_mtime == 1

    def run(self, way: Callable[..., object], to: object, **options: object) -> object:
        directory = self.builder.directory
        request = RestoreRequest(
            directory=directory, point=directory.point("latest").id, to=str(to), **options
        )  # type: ignore[arg-type]
        return way(request, Silent()) if way is thin.restore else way(request, Silent(), Cancellation())


@pytest.fixture
def attack(builder: Builder, tmp_path: Path) -> Attack:
    victim, image = tmp_path / "victim", tmp_path / "hostile"
    options = f"data_file={victim},data_file_raw=on"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE)], check=True, timeout=60
    )
    victim.write_bytes(PRECIOUS)
    os.utime(victim, (1, 1))
    header = image.read_bytes()
    image.unlink()
    content = os.urandom(SIZE)
    builder.point(P1, (replace(disk_entry(size=SIZE), format="raw"), [(0, content)]))
    (tmp_path / "disks").mkdir()
    hostile = (header + content[len(header) :])[:SIZE]
    return Attack(builder, tmp_path / "disks", victim, hostile, content)


@pytest.mark.parametrize("name", NAMES)
def test_a_raw_disk_that_begins_as_a_qcow2_is_put_back_in_place_as_the_raw_disk_it_was(attack, name):
    disk = attack.disk(name)
    (report,) = attack.run(in_place.restore, disk).images
    assert attack.unharmed()
    assert report.format == "raw"
    assert disk.read_bytes() == attack.content


@pytest.mark.parametrize("name", NAMES)
def test_a_header_that_leads_elsewhere_is_refused_when_the_format_is_named(attack, name):
    """Also when the VM had its disk as a qcow2."""
    disk = attack.disk(name)
    with pytest.raises(UsageError, match=r"external file .*victim"):
        attack.run(in_place.restore, disk, image_format="qcow2")
    attack.builder.point(P2, (disk_entry(size=SIZE), [(0, b"A")]))
    with pytest.raises(UsageError, match=r"external file .*victim"):
        attack.run(in_place.restore, disk)
    assert attack.unharmed()
    assert disk.read_bytes() == attack.hostile


@pytest.mark.parametrize("name", NAMES)
def test_a_raw_disk_that_begins_as_a_qcow2_is_replaced_without_being_opened(attack, name):
    disk = attack.disk(name)
    if name == "disk.qcow2":
        with pytest.raises(UsageError, match=r"external file .*victim"):
            attack.run(whole.restore, disk, overwrite=True)
        assert disk.read_bytes() == attack.hostile
    attack.run(whole.restore, disk, overwrite=True, allowed=["data-file"])
    assert attack.unharmed()
    assert (as_raw(disk) if name == "disk.qcow2" else disk.read_bytes()) == attack.content


@pytest.mark.parametrize("name", NAMES)
def test_no_overlay_is_made_of_a_raw_disk_that_begins_as_a_qcow2(attack, name):
    disk = attack.disk(name)
    with pytest.raises(TargetExists):
        serve.serve(
            attack.builder.directory,
            serve.ServeRequest(attack.builder.directory.point("latest"), writable_overlay=disk),
            ready=lambda _exports: None,
            stop=Cancellation(),
        )
    assert disk.read_bytes() == attack.hostile
    attack.run(thin.restore, disk, overwrite=True, allowed=["data-file"])
    assert attack.unharmed()
    assert as_raw(disk) == attack.content


def exchanged_after_the_look(attack: Attack, monkeypatch, *options: object) -> Path:
    """Make a plain qcow2 that becomes another one as soon as its header was read."""
    disk, other = attack.directory / "disk.qcow2", attack.directory / "other"
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, disk, str(SIZE)], check=True, timeout=60)
    subprocess.run([*create, *options, other, str(SIZE)], check=True, timeout=60)
    exchanged, look = other.read_bytes(), foreign_header.read

    def looked(descriptor):
        found = look(descriptor)
        disk.write_bytes(exchanged)
        return found

    monkeypatch.setattr(foreign_header, "read", looked)
    return disk


def test_a_header_that_is_exchanged_after_the_look_at_it_gets_nothing_written_elsewhere(attack, monkeypatch):
    """QEMU opens what it names, with our rights; it is found there, and closed again."""
    disk = exchanged_after_the_look(attack, monkeypatch, "-o", f"data_file={attack.victim}")
    attack.victim.write_bytes(PRECIOUS)
    os.utime(attack.victim, (1, 1))
    with pytest.raises(UsageError, match=r"changed by another process meanwhile, so QEMU opened .*victim"):
        attack.run(in_place.restore, disk, image_format="qcow2")
    assert attack.unharmed()


def test_a_header_that_is_exchanged_after_the_look_at_it_resizes_nothing_of_roots(attack, monkeypatch):
    """qemu-img has no more rights than the owner of the image."""
    if os.geteuid() != 0:
        pytest.skip("only root has more rights than an owner")
    disk = exchanged_after_the_look(attack, monkeypatch, "-o", f"data_file={attack.victim},data_file_raw=on")
    attack.victim.write_bytes(PRECIOUS)
    attack.victim.chmod(0o600)
    os.utime(attack.victim, (1, 1))
    os.chown(disk, 4711, 4711)
    attack.builder.point(P2, (disk_entry(size=2 * SIZE), [(0, b"A")]))
    with pytest.raises(BackupctlError, match=r"victim': Permission denied"):
        attack.run(in_place.restore, disk)
    assert attack.unharmed()


def test_a_header_that_is_exchanged_after_the_look_at_it_opens_no_backing_file(attack, monkeypatch):
    """QEMU is told that there is none, so what the header says by then does not matter."""
    disk = exchanged_after_the_look(attack, monkeypatch, "-u", "-b", "/no/such/file", "-F", "raw")
    attack.run(in_place.restore, disk, image_format="qcow2")
    monkeypatch.undo()
    command = ["qemu-img", "compare", f"json:{json.dumps(plain(disk))}"]
    wanted = attack.directory / "wanted.raw"
    wanted.write_bytes(attack.content)
    subprocess.run([*command, f"json:{json.dumps(raw(wanted))}"], check=True, timeout=60)


def plain(path: Path) -> dict[str, object]:
    return {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(path)}}


def raw(path: Path) -> dict[str, object]:
    return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


TOOL = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
os.execvp({tool!r}, [{tool!r}, *sys.argv[1:]])
"""


@pytest.fixture
def called(tmp_path: Path, monkeypatch) -> Callable[[], Iterator[list[str]]]:
    """Record what QEMU's tools are called with."""
    log = tmp_path / "calls"
    for variable, tool in (("QEMU_IMG", "qemu-img"), ("QEMU_STORAGE_DAEMON", "qemu-storage-daemon")):
        program = tmp_path / f"recorded-{tool}"
        program.write_text(TOOL.format(python=sys.executable, log=str(log), tool=tool))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(variable, str(program))
    return lambda: map(json.loads, log.read_text().splitlines())


def assert_named(node: object) -> None:
    """Each image's driver is named; what is below a qcow2 is not left to its header."""
    if node is None:
        return
    assert isinstance(node, dict)
    assert "driver" in node, node
    if node["driver"] == "qcow2":
        assert "backing" in node, node
    for child in ("file", "backing"):
        if child in node:
            assert_named(node[child])


def images_of(call: list[str]) -> list[str]:
    if "qemu-img" in call[0]:
        if call[1] == "create":
            assert "-f" in call, call
            assert ("-b" in call) == ("-F" in call) == ("-u" in call), call
            return []
        return [argument for argument in call[2:] if "/" in argument]
    return [after for option, after in pairwise(call) if option == "--blockdev"]


def test_whoever_calls_qemus_tools_names_every_format(builder: Builder, tmp_path, called):
    builder.point(P1, (disk_entry(size=SIZE), [(0, b"a" * 100_000)]))
    point = builder.point(P2, (disk_entry(size=SIZE, parent=P1), [(65536, b"b" * 100_000)]))
    directory, stop = builder.directory, Cancellation()
    for kind in ("qcow2", "raw"):
        to = str(tmp_path / f"x.{kind}")
        whole.restore(RestoreRequest(directory=directory, point=P2, to=to), Silent(), stop)
        if kind == "raw":
            os.truncate(to, SIZE // 2)
        earlier = RestoreRequest(directory=directory, point=P1, to=to, image_format=kind)
        in_place.restore(earlier, Silent(), stop)
    thin.restore(RestoreRequest(directory=directory, point=P2, to=str(tmp_path / "thin.qcow2")), Silent())
    for overlay in (None, tmp_path / "over.qcow2", tmp_path / "over.qcow2"):
        ended = Cancellation()
        serve.serve(
            directory,
            serve.ServeRequest(point, writable_overlay=overlay),
            ready=lambda _exports, ended=ended: ended.request("SIGTERM"),
            stop=ended,
        )
    verify(builder.repository, None, None, VerifyScope(), Silent(), stop)
    prune(directory, Rules(last=1), Silent(), stop)
    seen = 0
    for call in called():
        for image in images_of(call):
            named = "-f" in call or assert_named(json.loads(image.removeprefix("json:"))) is None
            assert named, call
            seen += 1
    assert seen > 10


def test_every_refusal_is_one_that_leaves_things_as_they_are(attack):
    disk = attack.disk("disk.qcow2")
    with pytest.raises(BackupctlError) as caught:
        attack.run(in_place.restore, disk, image_format="qcow2")
    assert caught.value.state == "nothing was touched"
    assert "--allow-image-feature data-file" in caught.value.next_command
