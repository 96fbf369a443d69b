# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways of a notice: what arrives, how long it may take, and that no secret of a URL is shown."""

import json
import logging
import socket
import threading
import time
from email import message_from_string

import pytest

from backupctl.monitoring import channels, notices
from backupctl.monitoring.channels import Attempt, Channels
from backupctl.monitoring.result import Result
from tests.unit.monitoring.listeners import listener, sendmail
from tests.unit.monitoring.test_notices import DONE, FAILED

NOTICE = notices.compose("failure", FAILED)
STARTED = Result("web", "full", "/r", began=1000.0)
SECRET = "s3cr3t-token"


@pytest.fixture
def server():
    with listener() as made:
        yield made


@pytest.fixture(autouse=True)
def secret_is_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    yield
    assert SECRET not in caplog.text


def sent(**given: object) -> list[Attempt]:
    attempts = list(channels.send(Channels(**given), NOTICE))
    assert SECRET not in str(attempts)
    return attempts


def test_a_webhook_gets_a_document(server):
    assert sent(webhook=f"{server.url}/hook?key={SECRET}") == [Attempt("webhook", "")]
    (got,) = server.seen
    assert got.path == f"/hook?key={SECRET}"
    assert got.headers["Content-Type"] == "application/json"
    body = json.loads(got.body)
    assert (body["notice"], body["vm"], body["error"]["kind"]) == ("failure", "web", "WriteFailed")
    assert body["subject"] == NOTICE.subject


def test_ntfy_gets_a_text_with_title_and_priority(server):
    assert sent(ntfy=f"{server.url}/topic") == [Attempt("ntfy", "")]
    (got,) = server.seen
    assert (got.headers["Title"], got.headers["Priority"]) == (NOTICE.subject, "high")
    assert got.body == NOTICE.text


def test_healthchecks_is_told_of_start_success_and_failure(server):
    asked = Channels(healthchecks=f"{server.url}/ping/{SECRET}/?rid=1")
    for result in (STARTED, DONE, FAILED):
        assert list(channels.ping(asked, result)) == [Attempt("healthchecks", "")]
    base = f"/ping/{SECRET}"
    assert server.paths() == [f"{base}/start?rid=1", f"{base}?rid=1", f"{base}/fail?rid=1"]
    assert server.seen[2].body == FAILED.message


def test_a_mail_goes_through_sendmail(tmp_path):
    program, mails = sendmail(tmp_path)
    assert sent(mail="root, a@example.org", sendmail=str(program)) == [Attempt("mail", "")]
    options, _, text = mails.read_text().partition("\n")
    assert options == "-i -t"
    mail = message_from_string(text)
    assert (mail["To"], mail["Subject"]) == ("root, a@example.org", NOTICE.subject)
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail.get_payload() == NOTICE.text


def test_each_channel_is_tried_whatever_becomes_of_the_others(server, tmp_path):
    program, _ = sendmail(tmp_path, code=75)
    attempts = sent(mail="root", sendmail=str(program), webhook="http://127.0.0.1:1/", ntfy=f"{server.url}/t")
    assert attempts == [
        Attempt("mail", f"{program} failed with exit code 75: queue is full"),
        Attempt("webhook", "Connection refused"),
        Attempt("ntfy", ""),
    ]


@pytest.mark.parametrize("status", [404, 500])
def test_an_answer_that_is_no_success_is_told_without_the_url(server, status):
    server.status = status
    assert sent(webhook=f"{server.url}/{SECRET}") == [
        Attempt("webhook", f"the server answered with status {status}")
    ]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server, status):
    """It could lead to a host without TLS, and the token with it."""
    server.status, server.headers = status, {"Location": f"{server.url}/elsewhere"}
    assert sent(webhook=f"{server.url}/{SECRET}")[0].why == f"the server answered with status {status}"
    assert server.paths() == [f"/{SECRET}"]


@pytest.mark.parametrize("drops", [False, True], ids=["silent", "dripping"])
def test_a_server_that_does_not_come_to_an_end_is_left_in_time(drops):
    """Each byte renews the time-out of the socket, and not that of the notice."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while drops and not done.wait(0.05):
                    connection.sendall(b"x")
                done.wait(60)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        begun = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/{SECRET}"
        (attempt,) = sent(webhook=url, limit_seconds=0.5)
        done.set()
        thread.join(5)
    assert attempt.why
    assert time.monotonic() - begun < 30


def test_what_is_no_http_is_a_failure_without_the_url():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"garbage\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        (attempt,) = sent(webhook=f"http://127.0.0.1:{server.getsockname()[1]}/{SECRET}", limit_seconds=5)
        thread.join(5)
    assert attempt.why
