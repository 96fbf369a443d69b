# SPDX-License-Identifier: GPL-2.0-or-later
"""What programs rest on: the code of each class of error; and how an error says what it is about."""

import pytest

from backupctl import errors
from backupctl.errors import BackupctlError, CommandFailed, Failed, ReadFailed, WriteFailed, moving

CODES = {
    *("BackupctlError", "UsageError", "Locked", "DamageFound", "NeedsRecovery", "Failed", "Interrupted"),
    *("Refused", "ViewUnavailable", "MonitorError", "MonitorUnreachable", "VmIsOff"),
    *("CommandFailed", "OutcomeUnknown"),
    *("AgentError", "AgentUnavailable", "AgentRefused", "AgentTimeout", "FreezeOverrun", "GuardLost"),
    *("TransferError", "ReadFailed", "WriteFailed", "RepositoryError", "NotARepository"),
    *("RepositoryUnreadable", "UnknownFormat", "InvalidName", "NoSuchPoint", "TargetExists", "HookFailed"),
    "AmbiguousPoint",
    "VmIsOff",
    "FilesystemError",
    "RestoreTestFailed",
}
"""Interface, whatever the classes are called: a code is never changed, and none is taken out."""


def classes(kind: type[BackupctlError] = BackupctlError) -> list[type[BackupctlError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in classes(child))]


def test_every_class_has_a_code_of_its_own():
    own = [kind for kind in classes() if kind.__module__ == "backupctl.errors"]
    assert [kind.__name__ for kind in own if "code" not in vars(kind)] == []
    assert len({kind.code for kind in own}) == len(own)


def test_the_codes_are_the_ones_that_programs_know():
    assert {kind.code for kind in classes() if kind.__module__ == "backupctl.errors"} == CODES


def test_a_message_begins_with_its_subject():
    err = Failed("No space left on device")
    assert err.message == "No space left on device"
    err.add(subject="cannot write vda")
    assert str(err) == err.message == "cannot write vda: No space left on device"
    assert err.add(subject="cannot write vdb").message == "cannot write vda: No space left on device"


@pytest.mark.parametrize(
    ("kind", "said"), [(ReadFailed, "cannot read vda"), (WriteFailed, "cannot write out")]
)
def test_a_transfer_names_what_it_could_not_read_or_write(kind, said):
    with pytest.raises(kind, match=f"^{said}: Input/output error$"), moving("vda", "out"):
        raise kind("Input/output error")


def test_a_transfer_adds_no_second_subject():
    with pytest.raises(WriteFailed, match=r"^cannot resize out: full$"), moving("vda", "out"):
        raise WriteFailed("full", subject="cannot resize out")


def test_a_reworded_error_is_of_the_same_class_and_keeps_the_rest():
    err = CommandFailed("query-block", "GenericError", "no")
    made = err.add(state="as before", hint="wait").reworded("two failures")
    assert type(made) is CommandFailed
    assert (str(made), made.state, made.hint, made.command) == (
        "two failures",
        "as before",
        "wait",
        "query-block",
    )
    assert "query-block" in err.message


@pytest.mark.parametrize("code", ["AgentTimeout", "Refused", "FreezeOverrun"])
def test_an_error_of_another_process_comes_back_as_what_it_was(code):
    found = errors.received(code, "silent", "frozen")
    assert (found.code, found.message, found.state) == (code, "silent", "frozen")


@pytest.mark.parametrize("code", ["CommandFailed", "errors", "moving", ""])
def test_a_code_that_no_process_of_ours_sends_is_a_failure_and_nothing_worse(code):
    assert type(errors.received(code, "x", "")) is Failed
