# SPDX-License-Identifier: GPL-2.0-or-later
"""Which right is missing, as another user without any is told."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from backupctl.system import rights
from tests.conftest import ROOT

NOBODY = 65_534


@pytest.mark.skipif(os.geteuid() != 0, reason="looks as another user, which takes root")
def test_a_directory_that_is_closed_is_named_before_the_file(held):
    # Not `tmp_path`: every start of pytest closes the directories that pytest makes.
    open_to_all = Path(held.enter_context(tempfile.TemporaryDirectory()))
    open_to_all.chmod(0o711)
    closed = open_to_all / "it's closed"
    (closed / "below").mkdir(parents=True)
    closed.chmod(0o700)
    code = (
        f"import os, pathlib, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom backupctl.system import rights\n"
    )
    code += f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
    code += f"print(rights.advice(pathlib.Path({str(closed / 'below' / 'image')!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == (
        f"user nobody may not enter {closed}; its owner may run: "
        f"setfacl -m u:nobody:x '{open_to_all}/it'\"'\"'s closed'\n"
    )


def test_the_right_that_is_missing_to_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(rights, "_user", lambda: "keeper")
    given = rights.advice(tmp_path / "image")
    assert given == f"user keeper may not read it; its owner may run: setfacl -m u:keeper:r {tmp_path}/image"
    given = rights.advice(tmp_path / "image", writes=True)
    assert given.endswith(f"may not write to it; its owner may run: setfacl -m u:keeper:rw {tmp_path}/image")


def test_a_user_without_a_name_is_named_by_the_number(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    assert rights._user() == "3999999999"
