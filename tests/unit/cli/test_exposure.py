# SPDX-License-Identifier: GPL-2.0-or-later
"""What `doctor` says of the programs that a configuration names."""

import pytest

from backupctl.cli import exposure
from backupctl.cli.configuration import Config
from backupctl.cli.settings import HookSettings, NotifySettings, VmSettings
from backupctl.system import ssh


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def messages(**said: object) -> list[str]:
    return [one.said for one in exposure.named_programs(VmSettings(**said))]


def test_a_hook_that_others_could_replace_is_told_before_it_is_needed(program):
    hooks = HookSettings(after=[str(program), "x"], before=[], failed=None)
    assert messages(hooks=hooks) == []
    program.chmod(0o777)
    (found,) = exposure.named_programs(VmSettings(hooks=hooks))
    assert found.said.startswith(f"the hook `after` will not run: {program} is not trusted")
    assert (found.verdict, found.advice) == ("warning", f"chmod go-w {program}")


def test_a_missing_sendmail_is_told_if_mail_is_to_be_sent(program, tmp_path):
    missing = str(tmp_path / "none")
    assert messages(notify=NotifySettings(sendmail=missing)) == []
    (said,) = messages(notify=NotifySettings(mail="root", sendmail=missing))
    assert said == f"sendmail will not run: {missing} cannot be started: No such file or directory"
    assert messages(notify=NotifySettings(mail="root", sendmail=str(program))) == []


def test_an_ssh_config_that_the_environment_names_is_told(program, monkeypatch):
    monkeypatch.setenv(ssh.CONFIG_VARIABLE, str(program))
    told = list(exposure.configuration(Config()))[-1]
    assert (told.verdict, told.said) == ("ok", f"{ssh.CONFIG_VARIABLE} is set: ssh reads {program}")
    program.chmod(0o777)
    told = list(exposure.configuration(Config()))[-1]
    assert (told.verdict, told.advice) == ("warning", f"unset {ssh.CONFIG_VARIABLE}")
    assert f"{program} is not trusted" in told.said
