# SPDX-License-Identifier: GPL-2.0-or-later
"""Addresses of sockets: what is read, and what is refused."""

import pytest

from backupctl.errors import UsageError
from backupctl.system.address import Address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://host/run/web.qmp", Address("/run/web.qmp", "host")),
        ("ssh://root@host/run/web.qmp", Address("/run/web.qmp", "host", None, "root")),
        ("ssh://host:2222/q", Address("/q", "host", 2222)),
        ("ssh://a.b-c@h.example.org:22/q", Address("/q", "h.example.org", 22, "a.b-c")),
        ("ssh://[2001:db8::1]:22/q", Address("/q", "2001:db8::1", 22)),
        ("unix:/q", Address("/q")),
        ("tcp:host:1", Address(None, "host", 1)),
    ],
)
def test_an_address_is_read_and_written_alike(text, address):
    assert Address.parse(text) == address
    assert str(address) == text
    assert address.remote == text.startswith("ssh:")
    assert address.absolute() == address


@pytest.mark.parametrize(
    "rest",
    [
        "host/q",
        "//host",
        "//host/",
        "///q",
        "//-oProxyCommand=x/q",
        "//-l@host/q",
        "//a b/q",
        "//host;id/q",
        "//$(id)/q",
        "//host/q;id",
        "//host/q q",
        "//host/$HOME",
        "//host/q\n",
        "//host/q:'x'",
        "//host:0/q",
        "//host:65536/q",
        "//host:ssh/q",
        "//a@b@host/q",
        "//user:password@host/q",
        "//host/" + 256 * "q",
    ],
)
def test_what_could_mean_anything_to_a_shell_or_to_ssh_is_no_address(rest):
    with pytest.raises(UsageError, match=r"use ssh://\[USER@\]HOST"):
        Address.parse(f"ssh:{rest}")


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("unix:/q", True),
        ("ssh://host/q", True),
        ("tcp:127.0.0.1:1", True),
        ("tcp:127.9.9.9:1", True),
        ("tcp:[::1]:1", True),
        ("tcp:localhost:1", True),
        ("tcp:192.168.1.1:1", False),
        ("tcp:0.0.0.0:1", False),
        ("tcp:127.0.0.1.example.org:1", False),
        ("tcp:host:1", False),
    ],
)
def test_only_the_loopback_and_ssh_keep_what_is_said_to_themselves(text, stays):
    assert Address.parse(text).loopback is stays


def test_nothing_but_ssh_connects_to_a_socket_on_another_host(tmp_path):
    with pytest.raises(OSError, match="only ssh"):
        Address.parse(f"ssh://host{tmp_path}/q").connect(1.0)
