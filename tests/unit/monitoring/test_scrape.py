# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics as they are served to Prometheus: what is answered, to whom, and how often they are made."""

import http.client
import socket
import threading
from contextlib import contextmanager

import pytest

from backupctl.cancel import Cancellation
from backupctl.monitoring import exposition, scrape
from backupctl.monitoring.exposition import Gauge
from backupctl.monitoring.scrape import Metrics
from backupctl.system import listen

PATIENCE = 20


class Scraped:
    """A server in a thread. fails: whether the text cannot be made. made: how often it was made."""

    def __init__(self) -> None:
        self.fails = False
        self.made = 0
        self.address = ""
        self.ready = threading.Event()

    def make(self) -> str:
        if self.fails:
            raise OSError("the disk is gone")
        self.made += 1
        return f"backupctl_points {self.made}\n"

    def announce(self, address: str) -> None:
        self.address = address
        self.ready.set()

    @property
    def port(self) -> int:
        return int(self.address.split(":")[2].split("/")[0])

    def ask(self, path: str = "/metrics", method: str = "GET", host: str | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, headers={"Host": host} if host else {})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()


@contextmanager
def running():
    scraped, stop = Scraped(), Cancellation()
    with listen.tcp("127.0.0.1", 0) as listening:
        thread = threading.Thread(
            target=scrape.serve,
            args=(listening, Metrics(scraped.make)),
            kwargs={"ready": scraped.announce, "stop": stop},
        )
        thread.start()
        try:
            assert scraped.ready.wait(PATIENCE)
            yield scraped
        finally:
            stop.request("the test's end")
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def scraped():
    with running() as found:
        yield found


def test_the_address_is_that_of_the_metrics_and_their_type_is_prometheuss(scraped):
    assert scraped.address.endswith("/metrics")
    status, content, headers = scraped.ask()
    assert (status, content) == (200, b"backupctl_points 1\n")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_who_asks_often_gets_what_is_kept(scraped, monkeypatch):
    assert scraped.ask()[1] == scraped.ask("/metrics?x=y")[1]
    assert scraped.made == 1
    monkeypatch.setattr(scrape, "KEPT_SECONDS", 0.0)
    with running() as other:
        other.ask()
        assert other.ask()[1] == b"backupctl_points 2\n"


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metrics/../etc/passwd", "/Metrics", "/metrics.json"])
def test_nothing_else_is_served(scraped, path):
    assert scraped.ask(path)[0] == 404
    assert scraped.made == 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_reading_is_offered(scraped, method):
    assert scraped.ask(method=method)[0] == 501


def test_a_head_has_no_body(scraped):
    status, content, headers = scraped.ask(method="HEAD")
    assert (status, content, headers["Content-Length"]) == (200, b"", "19")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9876", "127.0.0.1.evil.example", "127.0.0.1:x"]
)
def test_a_foreign_host_name_for_this_address_is_refused(scraped, host):
    assert scraped.ask(host=host)[0] == 421
    assert scraped.made == 0


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080"])
def test_a_tunnel_or_a_proxy_may_have_another_port(scraped, host):
    assert scraped.ask(host=host)[0] == 200


def test_clients_that_say_nothing_hold_nobody_up(scraped):
    silent = [socket.create_connection(("127.0.0.1", scraped.port), PATIENCE) for _ in range(5)]
    try:
        assert scraped.ask()[0] == 200
    finally:
        for one in silent:
            one.close()


def test_metrics_that_cannot_be_made_break_one_scrape_only(scraped):
    scraped.fails = True
    with pytest.raises(http.client.HTTPException):
        scraped.ask()
    scraped.fails = False
    assert scraped.ask()[0] == 200


def test_all_samples_of_one_metric_are_together():
    found = exposition.text(
        Gauge(name, "Help.", {"vm": vm}, value)
        for vm, value in (("web", 1), ("db", 2))
        for name in ("backupctl_points", "backupctl_chain_layers")
    )
    assert found == (
        "# HELP backupctl_points Help.\n# TYPE backupctl_points gauge\n"
        'backupctl_points{vm="web"} 1\nbackupctl_points{vm="db"} 2\n'
        "# HELP backupctl_chain_layers Help.\n# TYPE backupctl_chain_layers gauge\n"
        'backupctl_chain_layers{vm="web"} 1\nbackupctl_chain_layers{vm="db"} 2\n'
    )
