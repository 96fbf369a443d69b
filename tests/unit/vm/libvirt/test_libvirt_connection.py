# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of libvirt end in time, and its errors say what to do."""

import threading
import time

import pytest

from backupctl.errors import CommandFailed, OutcomeUnknown
from backupctl.vm.libvirt import job
from backupctl.vm.libvirt.connection import HELD, NO_BACKUP_JOB, Connection


class LibvirtError(Exception):
    """What libvirt's module raises."""

    def __init__(self, code: int) -> None:
        super().__init__(f"error {code}")
        self.code = code

    def get_error_code(self) -> int:
        return self.code


def failing(code: int):
    def call():
        raise LibvirtError(code)

    return call


@pytest.fixture
def connection():
    made = Connection(5.0)
    made._handle = object()
    yield made
    made.give_up()


def test_a_call_returns_its_result(connection):
    assert connection.call("virFunction", lambda: 7) == 7


def test_each_call_and_its_end_are_logged(connection, monkeypatch):
    said = []
    monkeypatch.setattr(Connection, "log", staticmethod(lambda text, *values: said.append(text % values)))
    connection.call("virDomainGetState", lambda: 1)
    with pytest.raises(CommandFailed):
        connection.call("virDomainFSFreeze", failing(55))
    with pytest.raises(OutcomeUnknown):
        connection.call("virDomainBackupBegin", lambda: time.sleep(1), 0.1)
    assert said == [
        *("-> virDomainGetState", "<- virDomainGetState: done"),
        *("-> virDomainFSFreeze", "<- virDomainFSFreeze: error 55"),
        *("-> virDomainBackupBegin", "virDomainBackupBegin: no answer within 0.1 s"),
    ]


def test_a_call_that_hangs_has_an_unknown_outcome_in_time_and_ends_the_connection(connection):
    never = threading.Event()
    begun = time.monotonic()
    with pytest.raises(OutcomeUnknown, match="virDomainBackupBegin"):
        connection.call("virDomainBackupBegin", lambda: never.wait(60), 0.2)
    assert time.monotonic() - begun < 30
    assert not connection.alive
    with pytest.raises(OutcomeUnknown, match="broken"):
        connection.call("virDomainGetState", lambda: 1)
    never.set()


def test_clients_are_drained_while_a_call_is_waited_for(connection):
    drained = []
    connection.call("virDomainAbortJob", lambda: time.sleep(0.2), meanwhile=lambda: drained.append(1))
    assert len(drained) > 2


def test_a_refusal_keeps_the_connection_and_says_what_to_do(connection):
    with pytest.raises(CommandFailed) as raised:
        connection.call("virDomainBackupBegin", failing(int(HELD)))
    assert "another operation of libvirt" in raised.value.hint
    assert connection.alive


@pytest.mark.parametrize("code", [38, 39])
def test_a_connection_that_broke_is_not_used_again(connection, code):
    with pytest.raises(OutcomeUnknown):
        connection.call("virDomainGetState", failing(code))
    assert not connection.alive


class PlayedDomain:
    """A domain with a backup, which ends a little after it was aborted."""

    def __init__(self, socket: str, state: tuple[int, int] = (1, 1)) -> None:
        self.socket = socket
        self.now = state
        self.calls: list[str] = []
        self.left = 3
        self.occupied = 0

    def backupGetXMLDesc(self):  # noqa: N802 - libvirt's name
        if "abort" in self.calls:
            self.left -= 1
        if not self.socket or self.left < 0:
            raise LibvirtError(int(NO_BACKUP_JOB))
        return f"<domainbackup><server transport='unix' socket='{self.socket}'/></domainbackup>"

    def controlInfo(self):  # noqa: N802 - as above
        self.occupied -= 1
        return [2 if self.occupied >= 0 else 0, 0, 0]

    def abortJob(self):  # noqa: N802 - as above
        self.calls.append("abort")

    def state(self):
        return list(self.now)

    def resume(self):
        self.calls.append("resume")


def ended(connection, domain):
    connection.domain = domain
    order = domain.calls
    return job.end(
        connection, lambda path: path == "/ours", lambda: None, hang_up=lambda: order.append("hang up")
    )


def test_a_job_of_ours_is_aborted_when_clients_in_their_handshake_have_left(connection):
    domain = PlayedDomain("/ours")
    assert ended(connection, domain)
    assert domain.calls == ["hang up", "abort"]
    assert domain.left < 0, "it was waited for"


def test_a_job_of_somebody_else_is_left_alone(connection):
    domain = PlayedDomain("/theirs")
    assert not ended(connection, domain)
    assert domain.calls == []


def test_a_guest_that_an_io_error_paused_goes_on(connection):
    domain = PlayedDomain("/ours", (3, 5))
    ended(connection, domain)
    assert domain.calls[-1] == "resume"


def test_a_guest_that_somebody_paused_stays_paused(connection):
    domain = PlayedDomain("/ours", (3, 1))
    ended(connection, domain)
    assert "resume" not in domain.calls


def test_a_job_that_does_not_end_is_an_unknown_outcome(connection):
    connection.seconds = 0.3
    domain = PlayedDomain("/ours")
    domain.left = 10**6
    with pytest.raises(OutcomeUnknown, match="has not ended"):
        ended(connection, domain)


def test_a_backup_that_is_about_to_begin_is_waited_for(connection):
    domain = PlayedDomain("")
    domain.occupied = 3
    began = domain.controlInfo

    def control_info():
        answer = began()
        domain.socket = "" if answer[0] else "/ours"
        return answer

    domain.controlInfo = control_info
    assert ended(connection, domain)
    assert domain.calls[-1] == "abort"


def test_a_qemu_that_hangs_leaves_it_unknown_whether_a_backup_begins(connection):
    connection.seconds = 0.2
    domain = PlayedDomain("")
    domain.occupied = 10**6
    with pytest.raises(OutcomeUnknown, match="still waits for QEMU"):
        ended(connection, domain)


def test_an_error_that_tells_nothing_of_a_job_is_raised(connection):
    connection.domain = PlayedDomain("")
    connection.domain.backupGetXMLDesc = failing(1)
    with pytest.raises(CommandFailed):
        job.socket_of_job(connection)
