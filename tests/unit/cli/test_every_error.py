# SPDX-License-Identifier: GPL-2.0-or-later
"""Every class of error, met by a command: what it says, and the command that it names to run next."""

import json
import shlex

import pytest

from backupctl import errors
from backupctl.errors import BackupctlError
from backupctl.repository.repository import Repository
from backupctl.vm.qmp.monitor import Monitor
from tests.screens.terminal import Look, look_at
from tests.unit.cli.test_command_line import every_error
from tests.unit.cli.test_next_command import typed

SAME = "incremental"
NEXT = {
    "UsageError": "",  # its hint says what to write instead
    "InvalidName": "",
    "Locked": "status",
    "DamageFound": "verify",
    "NeedsRecovery": "recover",
    "Failed": "doctor",
    "Interrupted": SAME,
    "HookFailed": "doctor",
    "Refused": "doctor",
    "ViewUnavailable": f"{SAME} --view fleecing",
    "MonitorError": "doctor",
    "MonitorUnreachable": "doctor",
    "CommandFailed": "doctor",
    "OutcomeUnknown": SAME,
    "AgentError": "doctor",
    "AgentUnavailable": "doctor",
    "AgentRefused": "doctor",
    "AgentTimeout": SAME,
    "FreezeOverrun": "doctor",
    "FilesystemError": "doctor",
    "RestoreTestFailed": "doctor",
    "GuardLost": "doctor",
    "TransferError": "doctor",
    "ReadFailed": SAME,
    "WriteFailed": "doctor",
    "RepositoryError": "doctor",
    "RepositoryUnreadable": "doctor",
    "NotARepository": "doctor",
    "UnknownFormat": "doctor",
    "NoSuchPoint": "doctor",
    "AmbiguousPoint": "doctor",
    "TargetExists": "doctor",
}
"""The command that gets on after each. The same again only where it may meet something else then."""


def made(kind: type[BackupctlError]) -> BackupctlError:
    if kind is errors.CommandFailed:
        return kind("query-block", "GenericError", "no")
    if kind is errors.OutcomeUnknown:
        return kind("transaction", "silent")
    return kind("something failed")


def classes() -> list[type[BackupctlError]]:
    """Return those that a command can end with; a VM that is off is skipped, which is no error."""
    return [kind for kind in every_error() if kind not in (BackupctlError, errors.VmIsOff)]


def test_the_table_tells_of_every_class():
    assert {kind.__name__ for kind in classes()} == set(NEXT)


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_error_is_told_whole_and_names_a_command_that_runs_as_it_stands(kind, tmp_path, monkeypatch):
    """Met in the first step of a run, where each of them can come up."""

    def fail(*_arguments, **_options):
        raise made(kind)

    monkeypatch.setattr(Monitor, "connect", fail)
    repository = Repository.create(tmp_path / "my repository").path
    config = tmp_path / "backupctl.toml"
    config.write_text("")
    given = {"--repository": str(repository), "--config": str(config), "--qmp": "unix:/run/web.qmp"}
    options = [word for pair in given.items() for word in pair]
    seen = look_at(["incremental", "web", *options, "--json"], Look(0, "utf-8", False), monkeypatch)
    error = json.loads(seen.partition("stdout:\n")[2].partition("stderr:\n")[0])["error"]
    assert (error["kind"], error["exit_code"]) == (kind.__name__, kind.exit_code)
    assert error["message"]
    assert f"exit code {kind.exit_code}\n" in seen
    if not NEXT[kind.__name__]:
        return
    program, verb, *rest = shlex.split(error["next"])
    wanted, *more = NEXT[kind.__name__].split()
    assert (program, verb) == ("backupctl", wanted)
    context = typed(verb, *rest)  # click takes it
    assert context.params["name"] == "web"
    takes = {flag for one in context.command.params for flag in one.opts}
    for flag, value in given.items():
        assert flag not in takes or rest[rest.index(flag) + 1] == value
    assert more == rest[rest.index(more[0]) : rest.index(more[0]) + len(more)] if more else True
