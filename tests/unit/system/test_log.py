# SPDX-License-Identifier: GPL-2.0-or-later
"""What a log line shows of a message: short, and no secret."""

import json

import pytest

from backupctl.system.log import HIDDEN, Shown

SECRET = "correct horse battery staple"

MESSAGES = {
    "a secret object": {"qom-type": "secret", "id": "sec0", "data": SECRET},
    "a keyring": {"qom-type": "secret_keyring", "id": "sec0", "data": SECRET},
    "credentials": {"qom-type": "tls-creds-psk", "id": "tls0", "dir": "/etc/psk", "data": SECRET},
    "a property set": {"path": "/objects/sec0", "property": "data", "value": SECRET},
    "a password set": {"path": "/objects/x", "property": "password", "value": SECRET},
    "set_password": {"protocol": "vnc", "password": SECRET},
    "the agent's": {"username": "root", "password": SECRET, "crypted": False},
    "a cookie": {"driver": "https", "url": "https://host/disk", "cookie": SECRET},
    "deep inside": {"actions": [{"type": "x", "data": {"options": {"tls-psk": SECRET}}}]},
    "many": {"passphrase": [SECRET, SECRET]},
    "a number": {"passwd": 12345678},
    "in a URL": {"filename": "https://admin:correct%20horse@host/disk.qcow2"},
    "in a list": ["nbd://admin:correct%20horse@host/x"],
    "in a described file": {
        "filename": json.dumps({"driver": "https", "cookie": SECRET}).join(["json:", ""])
    },
    "in a described file, broken": {"filename": f'json:{{"cookie": "{SECRET}"'},
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_secret_is_never_shown(name):
    text = str(Shown(MESSAGES[name]))
    for secret in (SECRET, "correct", "12345678"):
        assert secret not in text
    assert HIDDEN in text


def test_what_is_no_secret_is_shown():
    message = {
        "type": "block-dirty-bitmap-add",
        "data": {"node": "drive-vda", "persistent": True, "granularity": 65536},
        "encrypted": False,
        "url": "nbd+unix:///disk?socket=/run/a@b",
    }
    assert json.loads(str(Shown(message))) == message


def test_a_line_stays_short_and_is_one_line_whatever_is_in_the_message():
    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    for message in ([{"name": "y" * 5000}] * 5000, deep, {"a\nb": "c\nd\x1b[2J"}, {"z" * 9000: 1}, object()):
        text = str(Shown(message))
        assert len(text) < 1100
        assert text.isprintable()


def test_only_the_first_items_of_a_large_reply_are_looked_at():
    class Counted(list):
        looked = 0

        def __iter__(self):
            for one in super().__iter__():
                Counted.looked += 1
                yield one

    assert str(Shown(Counted(range(100_000)))).endswith(', "..."]')
    assert Counted.looked < 200
