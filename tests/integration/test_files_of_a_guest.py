# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl files` on the disk of a real guest that was writing, without a freeze and with one."""

import hashlib
import time
from pathlib import Path

import pytest

from tests.conftest import Cli, get_build

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


@pytest.mark.parametrize("freeze", ["never", "require"])
def test_each_file_of_a_busy_guest_is_what_its_journal_says(boot, tmp_path, freeze):
    guest, cli = boot(get_build("7.2"), size=64 << 20)
    guest.tell("load")
    time.sleep(2)
    point = cli.json("full", "web", "--freeze", freeze)["point"]
    guest.tell("stop")
    lines = assert_files_agree(cli, point, tmp_path / "out")
    assert lines > 3


def assert_files_agree(cli: Cli, point: str, out: Path) -> int:
    """Copy all files out, and compare each with the last checksums that the guest noted of it.

    Only the very last file may be as it was before: it had no name yet.
    """
    found = cli.run("files", "web", point, "/", "--to", str(out), vm=False)
    assert "journal cannot be read" not in f"{found}"
    lines = [line.split() for line in (out / "journal").read_text().splitlines()]
    history: dict[str, list[str]] = {}
    for checksum, slot in lines:
        history.setdefault(slot, []).append(checksum)
    for slot, checksums in history.items():
        path, last = out / "files" / slot, lines[-1][1] == slot
        if last and len(checksums) == 1 and not path.exists():
            continue
        allowed = checksums[-2:] if last else checksums[-1:]
        assert hashlib.sha256(path.read_bytes()).hexdigest() in allowed, f"file {slot}"
    return len(lines)
