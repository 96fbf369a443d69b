# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets are taken out of texts and documents, those that are known and those that only look like one."""

import json

import pytest

from backupctl.outcome.redaction import Redaction

SECRET = "Hunter2-Zq8"


@pytest.mark.parametrize(
    "text",
    [
        f"https://hooks.example/services/{SECRET}",
        f"http://root:{SECRET}@hooks.example/x",
        f"nbd://root:{SECRET}@host/vda",
        f"https://hooks.example?key={SECRET}&more=1",
        f"password={SECRET}",
        f"PASSWORD: {SECRET}",
        f'"password": "{SECRET}"',
        f'{{"db-passwd" : "two words {SECRET}", "next": 1}}',
        f'a line of a log: "{{\\"secret\\": \\"{SECRET}\\"}}"',
        f"api_key='{SECRET}'",
        f"--password {SECRET}",
        f"--db-token={SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----\n",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text):
    assert SECRET not in Redaction().text(text)


def test_a_known_secret_is_taken_out_wherever_it_is_and_however_it_is_written():
    odd = 'a "quoted" sécret'
    found = Redaction((SECRET, odd)).text(f"x{SECRET}y, {odd}, {json.dumps(odd)}")
    assert found == 'x***y, ***, "***"'


def test_the_longer_of_two_secrets_is_taken_out_as_a_whole():
    assert Redaction(("abcd", "abcd-efgh")).text("abcd-efgh abcd") == "*** ***"


def test_a_document_hides_what_a_key_of_that_name_has():
    document = {"token": [SECRET], "a": [{"b": f"password={SECRET}", "secret": None}], SECRET: 1}
    assert Redaction((SECRET,)).value(document) == {
        "token": "***",
        "a": [{"b": "password=***", "secret": None}],
        "***": 1,
    }


@pytest.mark.parametrize(
    "text",
    [
        "virtio0 (40 MiB, qcow2) has a bitmap; 3 points in /backup/web",
        "the monitor unix:/run/qemu/web.qmp does not answer",
        "tcp:127.0.0.1:4444: connection refused",
    ],
)
def test_what_a_report_is_made_for_stays(text):
    assert Redaction((SECRET,)).text(text) == text
