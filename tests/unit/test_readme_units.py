# SPDX-License-Identifier: GPL-2.0-or-later
"""The systemd units and cron lines that README teaches are sound, and do what it says of them."""

import re
import shutil
import subprocess
import textwrap
from configparser import RawConfigParser
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BACKUPCTL = "/opt/backupctl/.venv/bin/backupctl"


class Unit(RawConfigParser):
    """A unit file: keys keep their case, and may come several times."""

    optionxform = staticmethod(str)  # type: ignore[assignment]


def block(before: str) -> str:
    """Return the indented block that follows a text in README."""
    rest = README[README.index(before) + len(before) :].split("\n", 1)[1]
    lines = []
    for line in rest.splitlines():
        if line and not line.startswith("    "):
            if lines:
                break
            continue
        lines.append(line)
    return textwrap.dedent("\n".join(lines)).strip() + "\n"


def units() -> dict[str, str]:
    return {
        "backupctl.service": block("By systemd: `/etc/systemd/system/backupctl.service`"),
        "backupctl.timer": block("`/etc/systemd/system/backupctl.timer`; then"),
        "backupctl-failed.service": block("`/etc/systemd/system/backupctl-failed.service`"),
    }


def test_the_unit_recovers_when_run_and_guard_were_killed_and_tells_somebody():
    unit = Unit(strict=False)
    unit.read_string(units()["backupctl.service"])
    assert unit["Service"]["ExecStopPost"] == f"-{BACKUPCTL} recover --all"
    assert unit["Unit"]["OnFailure"] == "backupctl-failed.service"
    wanted = {"KillMode": "process", "UMask": "0077", "NoNewPrivileges": "yes", "ProtectSystem": "strict"}
    assert {key: unit["Service"][key] for key in wanted} == wanted
    assert {"/backup", "/var/tmp"} <= set(unit["Service"]["ReadWritePaths"].split())


def test_cron_recovers_too():
    lines = re.findall(r"^ {4}[0-9].* root  (.*)$", README, re.MULTILINE)
    assert any(f"run --all --quiet || {BACKUPCTL} recover --all" in line for line in lines)
    assert all(line.startswith("umask 077; ") for line in lines)


def test_systemd_takes_the_units(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    for name, text in units().items():
        (tmp_path / name).write_text(text.replace(BACKUPCTL, "/bin/true"))
    for name in units():
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        )
        ours = [line for line in done.stderr.splitlines() if "backupctl" in line]
        assert (done.returncode, ours) == (0, [])
