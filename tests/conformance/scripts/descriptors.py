# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors over the monitor's socket: descriptor sets and named descriptors."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conformance import subjects
from tests.conformance.qmp import Monitor
from tests.conformance.session import Session, script

# QEMU 7.2 forgets a removed descriptor set only while the machine runs, hence "running" (`subjects`).


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@script("running")
def a_descriptor_set_lives_and_dies(s: Session) -> None:
    with opened(subjects.image(s.directory / "f")) as fd:
        s.do("add-fd", fd=fd, fdset_id=7, opaque="backupctl-x")
        s.do("query-fdsets")
        s.do("add-fd", fd=fd, fdset_id=7)
        s.do("add-fd", fd=fd, fdset_id=9, opaque="another")
    s.do("query-fdsets", lambda sets: sorted((each["fdset-id"], len(each["fds"])) for each in sets))
    s.do("remove-fd", fdset_id=7)
    s.do("remove-fd", fdset_id=9)
    s.do("query-fdsets")


@script("running")
def add_fd_chooses_an_id(s: Session) -> None:
    with opened(subjects.image(s.directory / "f")) as fd:
        s.do("add-fd", fd=fd)
        s.do("add-fd", fd=fd)
    s.do("query-fdsets", lambda sets: sorted(each["fdset-id"] for each in sets))


@script("running")
def descriptor_errors(s: Session) -> None:
    s.do("add-fd", fdset_id=1)
    s.do("remove-fd", fdset_id=1)
    s.do("remove-fd", fdset_id=-1)
    s.do("getfd", fdname="x")
    s.do("closefd", fdname="x")
    with opened(subjects.image(s.directory / "f")) as fd:
        s.do("add-fd", fd=fd, fdset_id=-1)
        s.do("getfd", fd=fd, fdname="9x")
        s.do("add-fd", fd=fd, fdset_id=3)
    s.execute("remove-fd", {"fdset-id": 3, "fd": 999999})
    s.do("query-fdsets")


@script("running")
def named_descriptor_is_closed_once(s: Session) -> None:
    with opened(subjects.image(s.directory / "f")) as fd:
        s.do("getfd", fd=fd, fdname="x")
        s.do("getfd", fd=fd, fdname="x")
    s.do("closefd", fdname="x")
    s.do("closefd", fdname="x")


@script("running")
def a_scratch_file_without_a_name_serves_a_node(s: Session) -> None:
    path = subjects.image(s.directory / "f")
    with opened(path) as fd:
        path.unlink()
        s.do("add-fd", fd=fd, fdset_id=7, opaque="backupctl-x")
    add = {"driver": "qcow2", "node-name": "tmp0", "backing": "drive-vda"}
    s.execute("blockdev-add", add | {"file": {"driver": "file", "filename": "/dev/fdset/7"}})
    s.fleece()
    s.subject.write("vda", 7, 0, 65536)
    s.end_job()
    s.do("remove-fd", fdset_id=7)
    s.do("query-fdsets")
    s.do("blockdev-del", node_name="tmp0")
    s.do("remove-fd", fdset_id=7)
    s.do("query-fdsets")


@script("running")
def descriptors_outlive_their_client_while_another_is_there(s: Session) -> None:
    with opened(subjects.image(s.directory / "f")) as fd:
        s.do("add-fd", fd=fd, fdset_id=7)
        s.do("getfd", fd=fd, fdname="x")
    s.monitor.close()
    s.monitor = Monitor(s.subject.qmp)
    s.monitor.receive()
    s.do("qmp_capabilities")
    s.do("query-fdsets")
    s.do("closefd", fdname="x")


@script()
def a_stopped_machine_may_keep_a_removed_set(s: Session) -> None:
    with opened(subjects.image(s.directory / "f")) as fd:
        s.do("add-fd", fd=fd, fdset_id=7)
    s.do("remove-fd", fdset_id=7)
    s.do("query-fdsets")
    s.do("cont")
    s.do("query-fdsets")
    with opened(subjects.image(s.directory / "g")) as fd:
        s.do("add-fd", fd=fd, fdset_id=8)
    s.do("remove-fd", fdset_id=8)
    s.do("query-fdsets")
    s.monitor.execute("remove-fd", {"fdset-id": 7})
    s.do("query-fdsets")


@script("running")
def a_descriptor_set_that_is_not_there(s: Session) -> None:
    add = {"driver": "qcow2", "node-name": "tmp0", "file": {"driver": "file", "filename": "/dev/fdset/8"}}
    s.execute("blockdev-add", add)


@script("running")
def a_read_only_descriptor_does_not_serve_a_writer(s: Session) -> None:
    with opened(subjects.image(s.directory / "f"), os.O_RDONLY) as fd:
        s.do("add-fd", fd=fd, fdset_id=7)
    add = {"driver": "qcow2", "node-name": "tmp0", "file": {"driver": "file", "filename": "/dev/fdset/7"}}
    s.execute("blockdev-add", add)


@script("running")
def an_nbd_server_on_a_listening_socket_of_ours(s: Session) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(s.nbd_socket))
        listener.listen(5)
        s.do("getfd", fd=listener.fileno(), fdname="backupctl-nbd")
    s.do("nbd-server-start", addr={"type": "fd", "data": {"str": "backupctl-nbd"}})
    s.export("drive-vda", name="disk")
    s.look("disk")
    s.unexport()
    s.do("nbd-server-stop")
    s.do("closefd", fdname="backupctl-nbd")


@script("running")
def an_nbd_server_on_a_name_that_nobody_sent(s: Session) -> None:
    s.do("nbd-server-start", addr={"type": "fd", "data": {"str": "never-sent"}})
    s.do("nbd-server-stop")
