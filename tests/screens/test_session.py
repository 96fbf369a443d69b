# SPDX-License-Identifier: GPL-2.0-or-later
"""A first session on a terminal is as it is kept in `golden/session/`. After a change: `make screens`."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from fixtures import dist
from tests.packages.installed import environment, install, with_dependencies
from tests.screens import session
from tests.screens.session import Session

GOLDEN = Path(__file__).parent / "golden/session"
RENEW = bool(os.environ.get("BACKUPCTL_RENEW_SCREENS"))


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    """Install the wheel into an empty environment, and play the session with it."""
    if not Path("/sbin/mke2fs").exists():
        pytest.skip("needs e2fsprogs")
    wheel, _source = dist.make(tmp_path_factory.mktemp("dist"))
    programs = environment(tmp_path_factory.mktemp("env") / "venv", "--system-site-packages")
    install(programs, "--no-deps", "--no-index", str(wheel))
    with_dependencies(programs)
    directory = Path(tempfile.mkdtemp(prefix="bs-", dir="/tmp"))  # as long as what is shown in its place
    try:
        return session.play(Session(programs, directory))
    finally:
        shutil.rmtree(directory)


@pytest.mark.timeout(600)
def test_each_screen_of_a_first_session_is_as_it_is_kept(screens):
    """One test, so that the session is played once, whatever the number of workers."""
    shown = {name: f"SPDX-License-Identifier: GPL-2.0-or-later\n\n{text}" for name, text in screens.items()}
    if RENEW:
        for name, text in shown.items():
            (GOLDEN / f"{name}.txt").write_text(text)
    assert shown == {path.stem: path.read_text() for path in GOLDEN.glob("*.txt")}
