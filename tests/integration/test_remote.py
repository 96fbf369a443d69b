# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM on another host, reached by ssh: an sshd on the loopback with keys of its own."""

import pytest

from fixtures.debian import CannotBeHad
from fixtures.sshd import Sshd

pytestmark = pytest.mark.simulator_too


@pytest.fixture
def sshd(tmp_path, held):
    try:
        made = Sshd(tmp_path / "sshd")
    except CannotBeHad as err:
        pytest.skip(str(err))
    held.callback(made.close)
    made.start()
    return made


def over_ssh(lab, sshd: Sshd) -> None:
    """Have the lab's command line reach its machine by ssh."""
    lab.cli.environment.update(sshd.environment)
    machine = lab.machine
    lab.cli.vm = ["--qmp", sshd.address(machine.qmp_path), "--agent", sshd.address(machine.agent_path)]


def test_full_and_incremental_over_ssh_restore_byte_equal_with_a_frozen_guest(any_build, make_lab, sshd):
    lab = make_lab(any_build)
    over_ssh(lab, sshd)
    for kind in ("full", "incremental"):
        lab.writer.write(10)
        report = lab.backup(kind, "--freeze", "require")
        assert report["consistency"] == "frozen", report
        lab.assert_point(report["point"], lab.writer.moment)
        lab.assert_at_rest()
    assert not sshd.sessions()
