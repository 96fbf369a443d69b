# SPDX-License-Identifier: GPL-2.0-or-later
"""Which versions of everything are at work: what a report of a problem has to say."""

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from backupctl import __version__
from backupctl.errors import RepositoryError
from backupctl.system import qemu_tools

_PACKAGES = ("qemu.qmp", "click", "rich", "msgspec", "numpy", "blake3")


@dataclass(frozen=True)
class Component:
    """One part. version: None if it was not found, or does not tell. path: of a program."""

    name: str
    version: str | None
    path: str | None = None


def components() -> tuple[Component, ...]:
    """Return backupctl, what it runs on, and QEMU's tools as a run would find them.

    Never raises: what is missing is what somebody wants to see.
    """
    return (
        Component("backupctl", __version__),
        Component("Python", platform.python_version()),
        Component("Linux", platform.release() or None),
        Component("libnbd", _libnbd()),
        *(Component(name, _installed(name)) for name in _PACKAGES),
        *_tools(),
    )


def _libnbd() -> str | None:
    """Return the version of the library itself, which its Python module is built for (nbd_get_version(3))."""
    try:
        import nbd  # noqa: PLC0415 - takes longer than most commands have

        return str(nbd.NBD().get_version())
    except (ImportError, AttributeError):
        return None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tools() -> Iterator[Component]:
    for name, program in (
        ("qemu-img", qemu_tools.img_program()),
        ("qemu-storage-daemon", qemu_tools.server_program()),
    ):
        path = shutil.which(program)
        try:
            yield Component(name, qemu_tools.version(path) if path else None, path or program)
        except RepositoryError:
            yield Component(name, None, path or program)
