# SPDX-License-Identifier: GPL-2.0-or-later
"""The URI of a libvirt on another host: what is taken, and what libvirt's own client would do that is not."""

import pytest

from backupctl.errors import UsageError
from backupctl.system import libvirt_uri


@pytest.mark.parametrize(
    ("text", "host", "user", "port", "socket"),
    [
        ("qemu+ssh://vmhost/system", "vmhost", None, None, ""),
        ("qemu+ssh://root@vmhost:2222/system", "vmhost", "root", 2222, ""),
        ("qemu+ssh://[::1]/system?socket=/run/l/s", "::1", None, None, "/run/l/s"),
    ],
)
def test_host_user_port_and_socket_are_read(text, host, user, port, socket):
    found = libvirt_uri.remote(text)
    assert (found.address.host, found.address.user, found.address.port) == (host, user, port)
    assert found.socket == socket
    assert libvirt_uri.is_remote(text)


@pytest.mark.parametrize(
    "text",
    [
        "qemu+ssh:///system",
        "qemu+ssh://vmhost/session",
        "qemu+ssh://vmhost",
        "qemu+ssh://-oProxyCommand=x/system",
        "qemu+ssh://vmhost/system?no_verify=1",
        "qemu+ssh://vmhost/system?command=/bin/x",
        "qemu+ssh://vmhost/system?socket=/a&no_verify=1",
        "qemu+ssh://vmhost/system?socket=relative",
        "qemu+ssh://vmhost:99999/system",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError):
        libvirt_uri.remote(text)


def test_a_libvirt_of_this_machine_is_not_remote():
    assert not libvirt_uri.is_remote("qemu:///system")
