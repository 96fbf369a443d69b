# SPDX-License-Identifier: GPL-2.0-or-later
"""The error with which a command ends that has done its work, because of what it has found meanwhile."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from backupctl.errors import BackupctlError, DamageFound, RepositoryUnreadable
from backupctl.names import VmName
from backupctl.operations.backup.outcome import RunReport
from backupctl.progress import counted

if TYPE_CHECKING:  # a backup needs neither, and would load both
    from backupctl.operations.prune.run import PruneReport
    from backupctl.operations.verify.run import VerifyReport


def of_backup(report: RunReport) -> Iterator[BackupctlError]:
    """Yield an error if a run met damage in older points; the new one is committed then."""
    if not report.damaged:
        return
    listed = ", ".join(f"{disk or 'all'} of {point}" for point, disk in report.damaged)
    yield DamageFound(
        f"the new point {report.point} of {report.vm} is committed and complete, but these older points "
        f"cannot be restored any more: {listed}",
        state="the backup itself is not affected: later points build on the new one",
        next_command=f"backupctl verify {report.vm}",
    )


def of_prune(vm: VmName, report: "PruneReport") -> Iterator[BackupctlError]:
    """Yield an error if a prune met damage."""
    if report.damage:
        yield DamageFound(
            "; ".join(report.damage),
            state="the kept points are unchanged; damaged layers are not merged",
            next_command=f"backupctl verify {vm}",
        )


def of_verify(reports: "Mapping[str, VerifyReport]", vm: VmName | None) -> Iterator[BackupctlError]:
    """Yield an error for damage, and one for what could not be read.

    reports: by the path of the repository. vm: the one that was named.
    """
    damage = [one for report in reports.values() for one in report.damage]
    unchecked = [one for report in reports.values() for one in report.unchecked]
    if damage:
        damaged = ", ".join(path for path, one in reports.items() if one.damage)
        yield DamageFound(
            f"damage found in {damaged}, {len(damage)} times",
            state="nothing was changed; all other points and ranges were verified",
            hint="a new full creates a complete point; damaged points need restore --allow-damage",
            next_command=f"backupctl full {damage[0].vm}",
        )
    if unchecked:
        unread = ", ".join(path for path, one in reports.items() if one.unchecked)
        yield RepositoryUnreadable(
            f"{counted(len(unchecked), 'part')} of {unread} could not be checked",
            state="nothing was changed; no damage was found in what could be read",
            hint="run it as root; look for disk errors in `dmesg`",
            next_command=f"backupctl verify {vm or ''}".strip(),
        )
