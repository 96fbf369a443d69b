# SPDX-License-Identifier: GPL-2.0-or-later
"""Who else could influence what backupctl does, or read what it stores: findings for `doctor`."""

import os
import shlex
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from backupctl.cli.configuration import Config
from backupctl.cli.settings import VmSettings
from backupctl.errors import UsageError
from backupctl.finding import Finding
from backupctl.names import VmName
from backupctl.system import programs, trusted
from backupctl.system.programs import SENDMAIL
from backupctl.system.ssh import CONFIG_VARIABLE

PROGRAMS = ("QEMU_IMG", "QEMU_STORAGE_DAEMON", "QEMU_SYSTEM")
_READ, _WRITE = stat.S_IRGRP | stat.S_IROTH, stat.S_IWGRP | stat.S_IWOTH


def configuration(config: Config) -> Iterator[Finding]:
    """Report which file is in use, and which programs the environment names."""
    if config.file:
        by = " (named by BACKUPCTL_CONFIG)" if os.environ.get("BACKUPCTL_CONFIG") == config.file else ""
        yield Finding("configuration", "ok", f"{config.file}{by}")
    else:
        yield Finding("configuration", "ok", "no configuration file found; using the command line only")
    for name in PROGRAMS:
        if program := os.environ.get(name):
            yield _program(name, program)
    if named := os.environ.get(CONFIG_VARIABLE):
        yield _named(CONFIG_VARIABLE, f"{CONFIG_VARIABLE} is set: ssh reads {named}", Path(named))


def _program(name: str, program: str) -> Finding:
    """Report a program that the environment names, and whether others could replace it."""
    said = f"{name} is set: {program} runs as {'root' if os.geteuid() == 0 else f'user {os.geteuid()}'}"
    return _named(name, said, Path(shutil.which(program) or program))


def _named(name: str, said: str, path: Path) -> Finding:
    if why := _objection(path):
        return Finding("configuration", "warning", f"{said}; {why.message}", f"unset {name}")
    return Finding("configuration", "ok", said)


def named_programs(said: VmSettings) -> Iterator[Finding]:
    """Warn of hooks, and of a sendmail, that would not be started. said: what is configured for the VM."""
    commands = {f"the hook `{name}`": getattr(said.hooks, name) for name in ("before", "after", "failed")}
    if said.notify.mail:
        commands["sendmail"] = [said.notify.sendmail or SENDMAIL]
    for what, command in commands.items():
        if command and (why := programs.objection(Path(command[0]))):
            yield Finding("configuration", "warning", f"{what} will not run: {why.message}", why.next_command)


def _objection(path: Path) -> UsageError | None:
    with suppress(OSError):  # a missing or unreadable file is reported elsewhere
        return trusted.objection(path)
    return None


def repository(path: Path, vm: VmName) -> Iterator[Finding]:
    """Warn of directories of a repository, or above it, that others than their owner may read or write."""
    for directory in (path, path / vm):
        try:
            found = directory.lstat()
        except OSError:  # an unreadable repository is reported elsewhere
            return
        if not stat.S_ISDIR(found.st_mode):
            continue
        if found.st_uid not in (0, os.geteuid()):
            said = f"{directory} belongs to user {found.st_uid}, who can replace every point in it"
            yield Finding(
                "repository", "warning", said, f"chown {os.geteuid()} {shlex.quote(str(directory))}"
            )
        can = [what for what, bits in (("readable", _READ), ("writable", _WRITE)) if found.st_mode & bits]
        if can:
            mode = f"{stat.S_IMODE(found.st_mode):04o}"
            said = f"{directory} is {' and '.join(can)} by other users (mode {mode})"
            yield Finding("repository", "warning", said, f"chmod go-rw {shlex.quote(str(directory))}")
    why = _objection(path / "repository.json")
    if why and not why.message.startswith(f"{path} "):
        said = f"{why.message}, so other users can replace the repository below it"
        yield Finding("repository", "warning", said, why.next_command)
