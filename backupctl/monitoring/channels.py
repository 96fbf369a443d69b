# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways that a notice takes: sendmail, a webhook, ntfy, and the pings of healthchecks.io.

A URL is a secret: whoever knows it can send, and often read. So no message and no log line shows more of it
than the host, and redirects, which could lead to a host without TLS, are not followed.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from backupctl import __version__
from backupctl.monitoring.notices import DEFAULT_REPEAT_SECONDS, Notice
from backupctl.monitoring.result import Result
from backupctl.system import programs
from backupctl.system.programs import SENDMAIL, ProgramFailed

_log = logging.getLogger("backupctl.monitoring.channels")

DEFAULT_SECONDS = 20.0
_MOST_CHARACTERS = 4000  # of a message by ntfy, whose limit is 4096 bytes, and of a ping
_TEXT = "text/plain; charset=utf-8"
_PRIORITIES = {"failure": "high", "recovery": "default", "success": "low"}


class NotSent(Exception):
    """A notice did not get through. The text says why, and holds no URL."""


@dataclass(frozen=True)
class Channels:
    """Where notices go; "" for a channel that is not used. limit_seconds: for each of them.

    success: whether every success is reported. repeat_seconds: see `notices`.
    """

    mail: str = ""
    sendmail: str = SENDMAIL
    webhook: str = ""
    ntfy: str = ""
    healthchecks: str = ""
    success: bool = False
    repeat_seconds: float = DEFAULT_REPEAT_SECONDS
    limit_seconds: float = DEFAULT_SECONDS


@dataclass(frozen=True)
class Attempt:
    """One way that a notice took. why: why it did not get through; "" if it did."""

    channel: str
    why: str


def send(channels: Channels, notice: Notice) -> Iterator[Attempt]:
    """Send a notice by every channel that is configured."""
    for name, address, deliver in (
        ("mail", channels.mail, _mail),
        ("webhook", channels.webhook, _webhook),
        ("ntfy", channels.ntfy, _ntfy),
    ):
        if address:
            yield _attempt(name, deliver, channels, notice)


def ping(channels: Channels, result: Result) -> Iterator[Attempt]:
    """Ping healthchecks: its check knows by itself what was reported already."""
    if channels.healthchecks:
        yield _attempt("healthchecks", _ping, channels, result)


def _attempt(
    name: str, deliver: Callable[[Channels, Any], None], channels: Channels, what: object
) -> Attempt:
    try:
        deliver(channels, what)
    except NotSent as err:
        return Attempt(name, str(err))
    return Attempt(name, "")


def _mail(channels: Channels, notice: Notice) -> None:
    message = EmailMessage()
    message["To"] = channels.mail
    message["Subject"] = notice.subject
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no robot answers it
    message.set_content(notice.text)
    try:
        programs.run([channels.sendmail, "-i", "-t"], bytes(message), {}, channels.limit_seconds)
    except ProgramFailed as err:
        raise NotSent(str(err)) from err


def _webhook(channels: Channels, notice: Notice) -> None:
    body = {"subject": notice.subject, **notice.document}
    _post(channels.webhook, json.dumps(body), {"Content-Type": "application/json"}, channels.limit_seconds)


def _ntfy(channels: Channels, notice: Notice) -> None:
    headers = {"Content-Type": _TEXT, "Title": notice.subject, "Priority": _PRIORITIES[notice.why]}
    _post(channels.ntfy, notice.text[:_MOST_CHARACTERS], headers, channels.limit_seconds)


def _ping(channels: Channels, result: Result) -> None:
    """https://healthchecks.io/docs/http_api/: URL/start, URL and URL/fail."""
    end = {"started": "/start", "success": "", "failure": "/fail"}[result.outcome]
    parts = urlsplit(channels.healthchecks)
    url = parts._replace(path=parts.path.rstrip("/") + end).geturl()
    _post(url, result.message[:_MOST_CHARACTERS], {"Content-Type": _TEXT}, channels.limit_seconds)


class _NoRedirect(HTTPRedirectHandler):
    """Follows none, so that a redirect is an error."""

    def redirect_request(self, *_: object) -> None:
        """Return nothing to go on with."""


def _post(url: str, body: str, headers: dict[str, str], limit_seconds: float) -> None:
    """Send a request, and end in time whatever resolver and server do. Raises NotSent."""
    found: list[str] = []
    # The time-out of a socket holds for one read, and for no name server: a thread has one for all.
    worker = threading.Thread(
        target=lambda: found.append(_posted(url, body, headers, limit_seconds)), daemon=True
    )
    worker.start()
    worker.join(limit_seconds)
    why = found[0] if found else f"no answer within {limit_seconds:g} s"
    _log.debug("POST to %s: %s", urlsplit(url).hostname, why or "sent")
    if why:
        raise NotSent(why)


def _posted(url: str, body: str, headers: dict[str, str], limit_seconds: float) -> str:
    """Send a request; return why that failed, "" if it did not."""
    asked = Request(  # noqa: S310 - the configuration takes http and https only
        url,
        body.encode(errors="replace"),
        {"User-Agent": f"backupctl/{__version__}", **headers},
        method="POST",
    )
    try:
        with build_opener(_NoRedirect).open(asked, timeout=limit_seconds):
            return ""
    except HTTPError as err:
        err.close()
        return f"the server answered with status {err.code}"
    except URLError as err:
        return _text(err.reason)
    except (OSError, HTTPException, ValueError) as err:
        return _text(err)


def _text(err: object) -> str:
    """Say what failed. An error's own text may hold the URL."""
    text = err.strerror if isinstance(err, OSError) else None
    return text or type(err).__name__
