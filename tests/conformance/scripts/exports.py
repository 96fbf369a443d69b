# SPDX-License-Identifier: GPL-2.0-or-later
"""The NBD server and its exports by monitor commands."""

import nbd

from tests.conformance.session import Session, script


@script()
def the_server_starts_and_stops_once(s: Session) -> None:
    s.do("nbd-server-stop")
    s.serve()
    s.serve()
    s.do("nbd-server-stop")
    s.do("nbd-server-stop")


@script()
def a_socket_that_cannot_be_made(s: Session) -> None:
    s.do("nbd-server-start", addr={"type": "unix", "data": {"path": str(s.directory / "absent" / "socket")}})
    s.do("nbd-server-start", addr={"type": "nonsense", "data": {}})
    for path in ("x" * 109, str(s.directory)):
        s.do("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    unix = {"type": "unix", "data": {"path": str(s.nbd_socket)}}
    s.do("nbd-server-start", addr=unix, tls_creds="absent")
    s.do("nbd-server-start", addr=unix, max_connections=-1)


@script()
def of_more_clients_than_allowed_the_last_one_waits(s: Session) -> None:
    s.do("nbd-server-start", addr={"type": "unix", "data": {"path": str(s.nbd_socket)}}, max_connections=1)
    with s.wire() as first:
        first.handshake()
        with s.wire(0.3) as second:
            try:
                s.note("while the first is here", second.handshake())
            except TimeoutError:
                s.note("while the first is here", "nothing")
    with s.wire() as third:
        s.note("after it left", third.handshake())


@script()
def an_export_needs_a_server(s: Session) -> None:
    s.export("drive-vda")


@script()
def an_export_comes_and_goes(s: Session) -> None:
    s.serve()
    s.export("drive-vda", name="disk")
    s.do("query-block-exports")
    s.do("block-export-del", id="e0")
    s.await_event("BLOCK_EXPORT_DELETED", id="e0")
    s.do("query-block-exports")
    s.do("block-export-del", id="e0")


@script()
def export_ids_and_names_are_unique(s: Session) -> None:
    s.serve()
    s.export("drive-vda", name="disk")
    s.export("drive-vda", name="other")
    s.export("drive-vda", "e1", name="disk")
    s.export("drive-vda", "9 bad id")
    for length in (4096, 4097):
        s.export("drive-vda", f"n{length}", name="n" * length)
        s.export("drive-vda", f"d{length}", name=f"d{length}", description="d" * length)
    s.export("drive-vda", "e2", name="thread", iothread="absent")
    s.do("query-block-exports", lambda found: sorted(e["id"] for e in found))


@script()
def exports_of_nothing_known(s: Session) -> None:
    s.serve()
    s.export("absent")
    s.do("block-export-add", type="nonsense", id="e0", node_name="drive-vda")
    s.do("block-export-add", type="nbd", node_name="drive-vda")
    s.do("block-export-del", id="absent")
    s.do("block-export-del", id="absent", mode="nonsense")


@script()
def bitmaps_of_an_export(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="on", granularity=65536)
    s.do("block-dirty-bitmap-add", node="drive-vda", name="off", disabled=True)
    s.serve()
    s.export("drive-vda", bitmaps=["absent"])
    s.export("drive-vda", bitmaps=["on"])
    s.export("drive-vda", bitmaps=[{"node": "absent", "name": "off"}])
    s.export("drive-vda", bitmaps=[{"node": "drive-vda", "name": "off"}])
    s.export("drive-vda", "e1", name="twice", bitmaps=["off"])
    s.do("query-block-exports", lambda found: sorted(e["id"] for e in found))


@script()
def an_enabled_bitmap_on_a_writable_export(s: Session) -> None:
    s.scratch(backing=None)
    s.do("block-dirty-bitmap-add", node="tmp0", name="on")
    s.serve()
    s.export("tmp0", writable=True, bitmaps=["on"])
    s.look("tmp0", "on")
    s.unexport()


@script()
def a_running_disk_cannot_be_exported_writable(s: Session) -> None:
    s.serve()
    s.export("drive-vda", writable=True)


@script("readonly")
def a_read_only_node_cannot_be_exported_writable(s: Session) -> None:
    s.serve()
    s.export("drive-vdc", writable=True)
    s.export("drive-vdc")


@script()
def a_bitmap_is_found_through_the_backing_link(s: Session) -> None:
    s.do("block-dirty-bitmap-add", node="drive-vda", name="b0", disabled=True)
    s.scratch()
    s.fleece()
    s.serve()
    s.export("tmp0", bitmaps=["b0"])
    s.export("tmp0", "e1", name="by-node", bitmaps=[{"node": "drive-vda", "name": "b0"}])
    s.unexport()
    s.end_job()


@script()
def an_exported_node_cannot_be_deleted(s: Session) -> None:
    s.scratch()
    s.serve()
    s.export("tmp0")
    s.do("blockdev-del", node_name="tmp0")
    s.unexport()
    s.do("blockdev-del", node_name="tmp0")


@script()
def safe_removal_waits_for_no_client_and_hard_for_none(s: Session) -> None:
    s.serve()
    s.export("drive-vda", name="disk")
    client = nbd.NBD()
    client.set_export_name("disk")
    client.connect_unix(str(s.nbd_socket))
    s.do("block-export-del", id="e0")
    s.do("block-export-del", id="e0", mode="safe")
    s.do("query-block-exports")
    s.do("block-export-del", id="e0", mode="hard")
    s.await_event("BLOCK_EXPORT_DELETED", id="e0")
    try:
        s.note("a read after that", len(client.pread(512, 0)))
    except nbd.Error:
        s.note("a read after that", "fails")
    s.do("query-block-exports")


@script()
def stopping_the_server_takes_its_exports_and_clients(s: Session) -> None:
    s.serve()
    s.export("drive-vda", name="disk")
    client = nbd.NBD()
    client.set_export_name("disk")
    client.connect_unix(str(s.nbd_socket))
    s.do("nbd-server-stop")
    s.await_event("BLOCK_EXPORT_DELETED", id="e0")
    s.do("query-block-exports")
    s.serve()
    s.do("nbd-server-stop")


@script()
def two_exports_on_one_server(s: Session) -> None:
    s.serve()
    s.export("drive-vda", "e0", name="a")
    s.export("drive-vdb", "e1", name="b")
    s.look("a")
    s.look("b")
    s.unexport("e0")
    s.look("a")
    s.look("b")
    s.unexport("e1")


@script()
def allocation_depth_is_a_context_too(s: Session) -> None:
    s.scratch()
    s.serve()
    s.export("tmp0", allocation_depth=True, description="a text")
    s.do("query-block-exports")
    s.unexport()
