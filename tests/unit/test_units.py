# SPDX-License-Identifier: GPL-2.0-or-later
"""The systemd units and cron lines in contrib/ are sound and hardened, and call commands that exist."""

import re
import shlex
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.parsing import parse

UNITS = ROOT / "contrib/systemd"
BACKUPCTL = "/usr/bin/backupctl"
SERVICES = ("backupctl.service", "backupctl@.service")
NAMES = (*SERVICES, "backupctl.timer", "backupctl@.timer", "backupctl-failed@.service")
WORST = 40
"""The exposure level of systemd-analyze security, in tenths, that no service may go above."""


class Unit(RawConfigParser):
    """A unit file: keys keep their case, and may come several times."""

    optionxform = staticmethod(str)  # type: ignore[assignment]


def service(name: str) -> dict[str, str]:
    unit = Unit(strict=False)
    unit.read(UNITS / name)
    return {**unit["Service"], **unit["Unit"]}


@pytest.fixture
def installed(tmp_path):
    """A directory with all units, and one of each template; they start `true` instead of backupctl."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    for name in NAMES:
        (tmp_path / name).write_text((UNITS / name).read_text().replace(BACKUPCTL, "/bin/true"))
        if "@." in name:
            (tmp_path / name.replace("@.", "@web.")).symlink_to(name)
    return tmp_path


def analyze(directory: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemd-analyze", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"SYSTEMD_UNIT_PATH": f"{directory}:", "PATH": "/usr/bin:/bin"},
    )


def test_these_are_all_units():
    assert sorted(path.name for path in UNITS.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_recovers_when_run_and_guard_were_killed_and_tells_somebody(name):
    found = service(name)
    assert found["ExecStopPost"].startswith(f"-{BACKUPCTL} recover ")
    assert found["OnFailure"] == "backupctl-failed@%n.service"
    wanted = {"KillMode": "process", "UMask": "0077", "NoNewPrivileges": "yes", "ProtectSystem": "strict"}
    assert {key: found[key] for key in wanted} == wanted
    assert "PrivateTmp" not in found  # QEMU connects to a socket there
    assert {"/tmp", "/var/tmp"} <= set(found["ReadWritePaths"].split())


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_calls_commands_that_exist_with_their_options(name):
    lines = re.findall(rf"^Exec\w+=-?{BACKUPCTL} (.*)$", (UNITS / name).read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        parse(shlex.split(line.replace("%i", "web")))


def test_cron_calls_commands_that_exist_and_recovers_too():
    text = (ROOT / "contrib/cron/backupctl").read_text()
    lines = re.findall(r"^[0-9*].* root  (.*)$", text, re.MULTILINE)
    assert any(f"run --all --quiet || {BACKUPCTL} recover --all" in line for line in lines)
    for line in lines:
        assert line.startswith("umask 077; ")
        for call in line.removeprefix("umask 077; ").removesuffix(" >/dev/null").split(" || "):
            program, *words = shlex.split(call)
            assert program == BACKUPCTL
            parse(words)


@pytest.mark.parametrize("name", NAMES)
def test_systemd_takes_a_unit_without_a_warning(installed, name):
    done = analyze(installed, "verify", "--man=no", str(installed / name.replace("@.", "@web.")))
    ours = [line for line in done.stderr.splitlines() if "backupctl" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_a_service_hardened(installed, name):
    done = analyze(
        installed,
        *("security", "--offline=yes", f"--threshold={WORST}", "--no-pager"),
        str(installed / name.replace("@.", "@web.")),
    )
    assert done.returncode == 0, done.stdout[-200:]


def test_a_service_without_hardening_is_found(installed):
    (installed / "bare.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = analyze(
        installed, "security", "--offline=yes", f"--threshold={WORST}", str(installed / "bare.service")
    )
    assert done.returncode != 0
