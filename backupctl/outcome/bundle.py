# SPDX-License-Identifier: GPL-2.0-or-later
"""A bundle of texts in one archive, for a report of a problem: who gets it needs nothing but tar."""

import io
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from backupctl.errors import UNTOUCHED, Failed, UsageError
from backupctl.system import durable, safe_directory

DIRECTORY = "backupctl-report"


def write(path: Path, files: Mapping[str, str]) -> None:
    """Write a tar.gz that only we may read: it is absent or complete, and replaces nothing.

    files: texts by their names in the archive. Raises UsageError, Failed.
    """
    try:
        place = safe_directory.resolve(path.parent) / path.name
        durable.publish(place, _packed(files))
    except FileExistsError as err:
        raise UsageError(f"{path} exists already", state=UNTOUCHED, hint="name a new file") from err
    except OSError as err:
        raise Failed(f"cannot write {path}: {err.strerror}", state=UNTOUCHED) from err


def _packed(files: Mapping[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in files.items():
            content = text.encode(errors="backslashreplace")
            member = tarfile.TarInfo(f"{DIRECTORY}/{name}")
            member.size, member.mode, member.mtime = len(content), 0o600, int(time.time())
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
