# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics as they are served to Prometheus: what is answered, to whom, and how often they are made."""

import http.client
import socket
from contextlib import contextmanager

import pytest

from backupctl.monitoring import exposition, scrape
from backupctl.monitoring.exposition import Gauge
from backupctl.monitoring.scrape import Metrics
from tests.unit.http_served import PATIENCE, HttpServed


class Scraped(HttpServed):
    """fails: whether the text cannot be made. made: how often it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.made = 0

    def make(self) -> str:
        if self.fails:
            raise OSError("the disk is gone")
        self.made += 1
        return f"backupctl_points {self.made}\n"


@contextmanager
def running():
    scraped = Scraped()
    with scraped.running(scrape.serve, Metrics(scraped.make)):
        yield scraped


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
