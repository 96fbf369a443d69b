# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl serve`, as a user runs it: what QEMU's own tools read from it, and what it leaves behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd
import pytest

from backupctl.cancel import Cancellation
from backupctl.errors import Locked, UsageError, WriteFailed
from backupctl.operations import serve as core
from backupctl.operations.serve import Export, ServeRequest
from backupctl.system import listen, locks
from backupctl.vm import filling
from backupctl.vm.filling import Filling
from backupctl.vm.scratch_directory import LOW_BYTES
from tests.unit.points import P1, P2, Builder, disk_entry

MIB = 1 << 20


@dataclass
class Serving:
    """A server that a test talks to."""

    child: "subprocess.Popen[str]"
    document: dict[str, Any]

    def uri(self, disk: str = "vda") -> str:
        return next(one["uri"] for one in self.document["exports"] if one["disk"] == disk)

    def content(self, target: Path, disk: str = "vda") -> bytes:
        subprocess.run(
            ["qemu-img", "convert", "-f", "raw", "-O", "raw", self.uri(disk), target], check=True, timeout=60
        )
        return target.read_bytes()

    def end(self, number: int = signal.SIGTERM) -> str:
        self.child.send_signal(number)
        _, said = self.child.communicate(timeout=60)
        assert self.child.returncode == 0, said
        return said


def command(builder: Builder, *arguments: object) -> list[str]:
    repository = str(builder.repository.path)
    return [
        sys.executable,
        "-m",
        "backupctl",
        "serve",
        "vm1",
        *map(str, arguments),
        "--repository",
        repository,
    ]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Serving]]:
    """Start `backupctl serve` with --json and wait until it tells where.

    Its own temporary directory has a short name: the name of a socket has at most 107 bytes.
    """
    with ExitStack() as held:
        temporary = held.enter_context(tempfile.TemporaryDirectory(prefix="bc-"))
        monkeypatch.setenv("TMPDIR", temporary)

        def start(builder: Builder, *arguments: object) -> Serving:
            child = subprocess.Popen(
                command(builder, *arguments, "--json"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            held.callback(_end, child)
            assert child.stdout is not None
            text = ""
            while not text.endswith("\n}\n"):
                line = child.stdout.readline()
                assert line, child.stderr.read() if child.stderr else ""
                text += line
            return Serving(child, json.loads(text))

        yield start


def _end(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:
        child.kill()
    child.communicate(timeout=60)


def refused(builder: Builder, *arguments: object, code: int = 2) -> str:
    done = subprocess.run(
        command(builder, *arguments), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()
    }


def test_every_disk_is_an_export_and_nothing_is_left_at_the_end(builder: Builder, serve, tmp_path):
    """QEMU's own tools read both disks, byte for byte; neither repository nor temporary directory change."""
    entries = (disk_entry("vda"), [(0, b"A" * 70_000)]), (disk_entry("vdb"), [(65_536, b"B" * 512)])
    builder.point(P1, *entries)
    before = tree(builder.repository.path)
    serving = serve(builder, "latest")
    assert serving.content(tmp_path / "a") == (b"A" * 70_000).ljust(MIB, b"\0")
    assert serving.content(tmp_path / "b", "vdb")[65_536:66_048] == b"B" * 512
    assert [one["writable"] for one in serving.document["exports"]] == [False, False]
    serving.end()
    assert tree(builder.repository.path) == before
    assert os.listdir(os.environ["TMPDIR"]) == []


def test_an_older_point_of_the_chain_is_shown_as_it_was(two_points, serve, tmp_path):
    builder, content = two_points
    older, newer = serve(builder, P1), serve(builder, P2)
    assert newer.content(tmp_path / "new") == content
    assert older.content(tmp_path / "old")[:70_000] == b"a" * 70_000
    assert older.content(tmp_path / "old") != content


def test_what_is_shown_can_not_be_written(two_points, serve):
    builder, _ = two_points
    serving = serve(builder, P2)
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write -P 1 0 512", serving.uri()],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert b"ead-only" in done.stderr or b"ermission" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_named_socket_is_private_and_goes_at_the_end(two_points, serve, tmp_path, number):
    builder, content = two_points
    path = tmp_path / "a b.sock"
    serving = serve(builder, P2, "--socket", path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert serving.uri() == f"nbd+unix:///vda?socket={tmp_path}/a%20b.sock"
    assert serving.content(tmp_path / "out") == content
    serving.end(number)
    assert not path.exists()


def test_tcp_is_served_on_this_machine_only(two_points, serve, tmp_path):
    builder, content = two_points
    serving = serve(builder, P2, "--tcp", "0")
    assert serving.uri().startswith("nbd://127.0.0.1:")
    assert serving.content(tmp_path / "out") == content
    said = serving.end()
    assert "warning: NBD over TCP has no authentication: every local user of this machine can read" in said
    assert "ssh -L 10809:PATH HOST" in said
    overlay = tmp_path / "overlay.qcow2"
    said = serve(builder, P2, "--tcp", "0", "--writable-overlay", overlay).end()
    assert f"can read these disks, and write to the overlay {overlay}" in said
    assert overlay.stat().st_mode & 0o077 == 0
    assert "warning" not in serve(builder, P2).end()


def test_a_client_that_stays_does_not_hold_up_the_end(two_points, serve):
    builder, _ = two_points
    serving = serve(builder, P2, "--tcp", "0")
    port = int(serving.uri().split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        assert client.recv(8) == b"NBDMAGIC"
        serving.end()


def test_a_socket_in_use_is_refused_and_goes_on_working(two_points, serve, tmp_path):
    builder, content = two_points
    path = tmp_path / "s"
    serving = serve(builder, P2, "--socket", path)
    assert "another process listens on it" in refused(builder, P1, "--socket", path)
    assert serving.content(tmp_path / "out") == content


def test_a_port_in_use_is_refused(two_points):
    builder, _ = two_points
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in refused(builder, P1, "--tcp", port)


def test_after_sigkill_nothing_serves_on_and_the_same_socket_is_free_again(two_points, serve, tmp_path):
    builder, content = two_points
    path = tmp_path / "s"
    dead = serve(builder, P2, "--socket", path)
    dead.child.kill()
    dead.child.wait(60)
    assert path.exists()
    assert serve(builder, P2, "--socket", path).content(tmp_path / "out") == content


def test_a_file_in_the_socket_s_place_is_never_removed(two_points, tmp_path):
    builder, _ = two_points
    (tmp_path / "precious").write_text("data")
    assert "not a socket" in refused(builder, P2, "--socket", tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "data"


def test_when_qemu_s_server_dies_that_is_an_error(two_points, serve):
    builder, _ = two_points
    serving = serve(builder, P2)
    children = Path(f"/proc/{serving.child.pid}/task/{serving.child.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    _, said = serving.child.communicate(timeout=60)
    assert serving.child.returncode == 1
    assert "qemu-storage-daemon ended" in said


def test_a_writable_overlay_takes_the_writes_and_keeps_them_for_the_next_time(two_points, serve, tmp_path):
    """The guest's writes land in the file; the repository is as before; a second serve goes on with them."""
    builder, content = two_points
    before = tree(builder.repository.path)
    overlay = tmp_path / "overlay.qcow2"
    serving = serve(builder, P2, "--writable-overlay", overlay)
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write -P 0x5a 131072 1000", serving.uri()], check=True, timeout=60
    )
    wanted = content[:131_072] + b"\x5a" * 1000 + content[132_072:]
    assert serving.content(tmp_path / "out") == wanted
    assert "overlay.qcow2" in serving.end()
    assert tree(builder.repository.path) == before
    again = serve(builder, P2, "--writable-overlay", overlay)
    assert again.content(tmp_path / "out") == wanted
    again.end()
    checked = subprocess.run(["qemu-img", "check", overlay], capture_output=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


def test_an_overlay_is_written_by_one_server_at_a_time(two_points, serve, tmp_path):
    builder, _ = two_points
    serve(builder, P2, "--writable-overlay", tmp_path / "o")
    assert "another process" in refused(builder, P2, "--writable-overlay", tmp_path / "o", code=75)


def test_an_overlay_is_for_its_own_point_and_never_in_the_repository(two_points, serve, tmp_path):
    builder, _ = two_points
    serve(builder, P2, "--writable-overlay", tmp_path / "o").end()
    assert "not an overlay of this point" in refused(builder, P1, "--writable-overlay", tmp_path / "o")
    (tmp_path / "precious").write_bytes(b"x" * 100)
    assert "not an overlay" in refused(builder, P2, "--writable-overlay", tmp_path / "precious")
    inside = builder.directory.path / P2 / "o"
    assert "inside the repository" in refused(builder, P2, "--writable-overlay", inside)
    assert not inside.exists()


def test_an_overlay_that_takes_the_room_of_vms_ends_the_server(two_points, tmp_path, monkeypatch):
    builder, _ = two_points
    monkeypatch.setattr(filling, "free_bytes", lambda _: LOW_BYTES - 1)
    monkeypatch.setattr(Filling, "who", lambda one: f"a.qcow2 is on {one.directory} too")
    shown: list[tuple[Export, ...]] = []
    request = ServeRequest(builder.directory.point(P2), writable_overlay=tmp_path / "o")
    with pytest.raises(WriteFailed, match=rf"255 MiB left\), and a\.qcow2 is on {tmp_path} too"):
        core.serve(builder.directory, request, ready=shown.append, stop=Cancellation())
    assert len(shown) == 1
    read_only = ServeRequest(request.point)  # which fills nothing
    core.serve(builder.directory, read_only, ready=shown.append, stop=Asked(times=2))
    assert len(shown) == 2


class Asked(Cancellation):
    """Ends a server that has looked so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_an_overlay_is_for_one_disk(builder: Builder, serve, tmp_path):
    builder.point(P1, (disk_entry("vda"), []), (disk_entry("vdb"), []))
    assert "--disk" in refused(builder, P1, "--writable-overlay", tmp_path / "o")
    serving = serve(builder, P1, "--disk", "vdb", "--writable-overlay", tmp_path / "o")
    assert [one["disk"] for one in serving.document["exports"]] == ["vdb"]


def test_what_is_not_there_is_named(two_points):
    builder, _ = two_points
    assert "no disk 'vdx'" in refused(builder, P2, "--disk", "vdx")
    assert "no recovery point" in refused(builder, "20250101T000000Z")
    assert "mutually exclusive" in refused(builder, P2, "--socket", "s", "--tcp", "0")
    assert "'--socket': cannot find the home directory" in refused(builder, P2, "--socket", "~no-such-user/s")


def test_a_point_is_held_with_all_below_it_for_as_long_as_it_is_shown(two_points, serve):
    """What prune does before it changes a point: nobody may be reading it, or what stands on it."""
    builder, _ = two_points
    serving = serve(builder, P2)
    for point in (P1, P2):
        with pytest.raises(Locked), locks.directory(builder.directory.path / point, 0):
            pass
    serving.end()
    for point in (P1, P2):
        with locks.directory(builder.directory.path / point, 0):
            pass


def test_damage_is_told_and_not_served(two_points):
    builder, _ = two_points
    image = builder.directory.path / P1 / "vda.qcow2"
    os.truncate(image, image.stat().st_size - 1)
    assert "bytes" in refused(builder, P2, code=4)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10809", ("127.0.0.1", 10809)),
        ("localhost:1", ("127.0.0.1", 1)),
        ("127.3.2.1:0", ("127.3.2.1", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses_of_this_machine_are_read(text, address):
    assert listen.tcp_address(text) == address


@pytest.mark.parametrize(
    "text", ["0.0.0.0:1", "192.168.1.2:1", "[::]:1", "example.org:1", "1:2:3", "", ":1", "70000"]
)
def test_other_addresses_are_refused(text):
    with pytest.raises(UsageError):
        listen.tcp_address(text)


def tls_directory(tmp_path: Path) -> Path:
    made = tmp_path / "tls"
    made.mkdir(0o700)
    (made / "keys.psk").write_text(f"reader:{'5a' * 32}\n")
    (made / "keys.psk").chmod(0o600)
    return made


def nbd_read(uri: str, keys: Path | None, length: int, certificates: Path | None = None) -> bytes:
    """Read the beginning of an export with libnbd, over TLS if there are keys or certificates."""
    client = nbd.NBD()
    if certificates is not None:
        client.set_tls(nbd.TLS_REQUIRE)
        client.set_tls_certificates(str(certificates))
    host, port, name = re.fullmatch(r"nbds?://([^/]+):(\d+)/(.*)", uri).groups()
    client.set_export_name(name)
    if keys is not None:
        client.set_tls(nbd.TLS_REQUIRE)
        client.set_tls_username("reader")
        client.set_tls_psk_file(str(keys))
    client.connect_tcp(host, port)
    return bytes(client.pread(length, 0))


def test_tls_with_a_pre_shared_key_is_served_on_any_address_and_to_nobody_without_the_key(
    two_points, serve, tmp_path
):
    builder, content = two_points
    keys = tls_directory(tmp_path)
    serving = serve(builder, P2, "--tcp", "0.0.0.0:0", "--tls", keys)
    uri = serving.uri().replace("0.0.0.0", "127.0.0.1")
    assert uri.startswith("nbds://")
    assert nbd_read(uri, keys / "keys.psk", 4096) == content[:4096]
    with pytest.raises(nbd.Error):
        nbd_read(uri, None, 4096)
    other = tmp_path / "other.psk"
    other.write_text(f"reader:{'a5' * 32}\n")
    with pytest.raises(nbd.Error):
        nbd_read(uri, other, 4096)
    assert "no authentication" not in serving.end()


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, timeout=60, capture_output=True)


def certificates(directory: Path, name: str, files: dict[str, str]) -> Path:
    """Make a directory with a certificate of the CA in `directory`, under the names that are wanted."""
    made = directory / name
    made.mkdir(0o700)
    key, request, certificate = (made / one for one in (files["key"], "request", files["cert"]))
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    extension = made / "extension"
    extension.write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", request, "-CA", directory / "ca.pem", "-CAkey", directory / "ca.key"),
        *("-CAcreateserial", "-days", 2, "-extfile", extension, "-out", certificate),
    )
    (made / "ca-cert.pem").write_bytes((directory / "ca.pem").read_bytes())
    return made


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl here")
def test_tls_with_certificates_serves_only_who_has_one_of_the_same_authority(two_points, serve, tmp_path):
    builder, content = two_points
    for one in ("ours", "theirs"):
        (tmp_path / one).mkdir()
        at = tmp_path / one
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", at / "ca.key"),
            *("-out", at / "ca.pem", "-days", 2, "-subj", f"/CN={one}"),
        )
    client = {"key": "client-key.pem", "cert": "client-cert.pem"}
    keys = certificates(tmp_path / "ours", "127.0.0.1", {"key": "server-key.pem", "cert": "server-cert.pem"})
    known = certificates(tmp_path / "ours", "reader", client)
    stranger = certificates(tmp_path / "theirs", "reader", client)
    (stranger / "ca-cert.pem").write_bytes((known / "ca-cert.pem").read_bytes())
    uri = serve(builder, P2, "--tcp", "0", "--tls", keys).uri()
    assert nbd_read(uri, None, 4096, known) == content[:4096]
    with pytest.raises(nbd.Error):
        nbd_read(uri, None, 4096, stranger)


def test_credentials_that_others_could_change_or_that_are_missing_serve_nothing(two_points, tmp_path):
    builder, _ = two_points
    keys = tls_directory(tmp_path)
    assert "--tls needs --tcp" in refused(builder, P2, "--tls", keys)
    (keys / "keys.psk").chmod(0o622)
    assert "writable by other users" in refused(builder, P2, "--tcp", "0", "--tls", keys)
    (keys / "keys.psk").unlink()
    assert "cannot read the TLS credentials" in refused(builder, P2, "--tcp", "0", "--tls", keys)
    (keys / "keys.psk").write_text("reader:00")
    assert "not an IP address" in refused(builder, P2, "--tcp", "example.org:0", "--tls", keys)
