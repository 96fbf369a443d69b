# SPDX-License-Identifier: GPL-2.0-or-later
"""The tutorial, command by command, as somebody new to backupctl would type it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backupctl.system import private_dir
from tests.conftest import ROOT

_PLACE = "/tmp/tutorial"


@pytest.fixture
def blocks() -> list[str]:
    page = (ROOT / "docs/tutorial.md").read_text()
    return re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def test_every_command_of_the_tutorial_works_and_the_one_failure_is_as_told(blocks):
    with private_dir.directory() as place:
        start, *rest, tidy = [block.replace(_PLACE, str(place)) for block in blocks]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        shell = {"env": environment, "cwd": place, "text": True, "executable": "/bin/bash"}
        command = start.replace("\nbackupctl", "\nexec backupctl")
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, **shell) as simulator:
            try:
                assert simulator.stdout is not None
                assert simulator.stdout.readline() == "ready\n"
                script = "set -e\n" + "\n".join(rest)
                done = subprocess.run(
                    script, shell=True, capture_output=True, check=False, timeout=120, **shell
                )
            finally:
                simulator.terminate()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "it failed with exit code 1" in done.stdout
        assert len(re.findall(r"^\d{8}T\d{6}Z", done.stdout.split("RETIRED")[-1], re.MULTILINE)) >= 2
        assert list((place / "restored").iterdir()) == [place / "restored/vda.qcow2"]
        subprocess.run(tidy, shell=True, check=True, **shell)
        assert not place.exists()
        place.mkdir()
