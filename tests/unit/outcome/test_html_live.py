# SPDX-License-Identifier: GPL-2.0-or-later
"""The report as a page that is served: who may read it, what it answers; no client holds it up."""

import http.client
import json
import socket
from contextlib import contextmanager

import pytest

from backupctl.outcome.html import live
from backupctl.outcome.html.live import LivePage
from backupctl.system import http_server
from tests.unit.http_served import PATIENCE, HttpServed


class Served(HttpServed):
    """version: what looks say. made: of which versions the page was made."""

    def __init__(self) -> None:
        super().__init__()
        self.version = "1"
        self.made: list[str] = []
        self.fails = False

    def render(self, version: str) -> bytes:
        if self.fails:
            raise OSError("the disk is gone")
        self.made.append(version)
        return b"page " + version.encode()


@contextmanager
def running():
    served = Served()
    page = LivePage(served.render, lambda: live.document([(0, "web", "full")], served.version))
    with served.running(live.serve, page):
        yield served


@pytest.fixture
def served():
    with running() as found:
        yield found


def test_the_page_and_what_changes_are_served(served):
    status, content, headers = served.ask()
    assert (status, content) == (200, b"page 1")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    status, content, _ = served.ask(served.path + "live.json")
    assert json.loads(content) == {"version": "1", "vms": [{"repository": 0, "vm": "web", "doing": "full"}]}


def test_the_page_is_made_anew_only_if_something_has_changed(served):
    served.ask()
    served.ask()
    served.version = "2"
    assert served.ask()[1] == b"page 2"
    assert served.made == ["1", "2"]


def test_an_old_page_is_made_anew(served, monkeypatch):
    served.ask()
    monkeypatch.setattr(live, "PAGE_SECONDS", 0.0)
    served.ask()
    assert served.made == ["1", "1"]


def test_without_the_token_there_is_nothing(served):
    for path in ("/", "//", "/live.json", "/x/", f"/{'x' * 24}/", served.path[:-2] + "/"):
        assert served.ask(path)[0] == 404
    assert served.made == []


def test_nothing_else_is_served_below_the_token(served):
    for path in ("etc/passwd", "../", "live.json/", "?x"):
        assert served.ask(served.path + path)[0] == 404


def test_a_foreign_host_name_for_this_address_is_refused(served):
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1", f"127.0.0.1:{served.port + 1}"):
        assert served.ask(host=host)[0] == 421
    assert served.ask(host=f"localhost:{served.port}")[0] == 200


def test_a_request_without_a_host_is_refused(served):
    with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as peer:
        peer.sendall(f"GET {served.path} HTTP/1.0\r\n\r\n".encode())
        assert b" 421 " in peer.makefile("rb").readline()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_reading_is_offered(served, method):
    assert served.ask(method=method)[0] == 501


def test_a_head_has_no_body(served):
    status, content, headers = served.ask(method="HEAD")
    assert (status, content, headers["Content-Length"]) == (200, b"", "6")


def test_clients_that_say_nothing_hold_nobody_up(served):
    silent = [socket.create_connection(("127.0.0.1", served.port), PATIENCE) for _ in range(5)]
    try:
        assert served.ask()[0] == 200
    finally:
        for one in silent:
            one.close()


def test_a_client_that_trickles_is_cut_off_in_time(monkeypatch):
    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.5)
    with running() as served, socket.create_connection(("127.0.0.1", served.port), PATIENCE) as peer:
        peer.sendall(b"GET /")
        peer.settimeout(8)  # less than the time that each read may take
        assert peer.recv(1000) == b""


def test_more_connections_than_are_answered_at_once_are_closed(monkeypatch):
    monkeypatch.setattr(http_server, "MOST_CONNECTIONS", 1)
    with running() as served, socket.create_connection(("127.0.0.1", served.port), PATIENCE) as first:
        first.sendall(b"GET /")
        with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as second:
            second.settimeout(8)
            assert second.recv(1000) == b""
        first.close()
        for _ in range(100):
            try:
                if served.ask()[0] == 200:
                    break
            except (OSError, http.client.HTTPException):
                continue
        else:
            pytest.fail("no connection is answered any more")


def test_a_page_that_cannot_be_made_breaks_one_connection_only(served):
    served.fails = True
    with pytest.raises(http.client.HTTPException):
        served.ask()
    served.fails = False
    assert served.ask()[0] == 200


def test_each_server_has_a_token_of_its_own():
    with running() as one, running() as other:
        assert len(one.path) > 24
        assert other.ask(one.path)[0] == 404
