# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory for scratch files, and the private directory in it of a run whose scratch files need names.

Whatever opens a scratch file by its name (QEMU where no descriptor can be passed, libvirt) finds it in a
directory of the run's own. Recovery knows that directory by its name, so it needs no VM to clean up.
"""

import os
import shutil
import tempfile
from pathlib import Path

from backupctl.errors import UNTOUCHED, Failed, Refused, UsageError
from backupctl.names import Namespace, VmName
from backupctl.system import safe_directory

LOW_BYTES = 256 * 1024 * 1024
"""What is left of a file system, at the least, where guests or scratch files may need it."""


def check(directory: Path) -> None:
    """Refuse a scratch directory that is missing or not writable. Raises Refused."""
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(
            f"the scratch directory {directory} is not a directory we can write to", state=UNTOUCHED
        )


def make_private(namespace: Namespace, vm: VmName, directory: Path) -> Path:
    """Make the run's directory for named files. Its name tells recovery whose it is.

    QEMU opens them by name, so root makes none where others could exchange the directory. Raises Refused.
    """
    try:
        safe_directory.resolve(directory)
    except UsageError as err:
        raise Refused(f"the scratch directory {err.message}") from err
    return Path(tempfile.mkdtemp(prefix=private_prefix(namespace, vm), dir=directory))


def sweep(namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
    """Remove the private directories that dead runs of this VM left; return what was done, in words.

    The caller holds the VM's lock. Raises Failed if the scratch directory cannot be read.
    """
    done = []
    for path in left_directories(namespace, vm, directory):
        shutil.rmtree(path, ignore_errors=True)
        done.append(f"removed the scratch directory {path}")
    return done


def left_directories(namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
    """Name the private directories that `sweep` would remove. Raises Failed if `directory` cannot be read.

    Those of another user are left to that user, unless root asks: this one could not remove them.
    """
    prefix = private_prefix(namespace, vm)
    try:
        with os.scandir(directory) as entries:
            return sorted(
                entry.path
                for entry in entries
                if entry.name.startswith(prefix)
                and entry.is_dir(follow_symlinks=False)
                and os.geteuid() in (0, entry.stat(follow_symlinks=False).st_uid)
            )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as err:
        raise Failed(f"cannot read the scratch directory {directory}: {err.strerror}") from err


def private_prefix(namespace: Namespace, vm: VmName) -> str:
    """Return how the name of each private directory of a VM begins."""
    # '@' cannot be part of a VM's name, so no VM's prefix is the beginning of another's.
    return f"{namespace.prefix}{vm}@"
