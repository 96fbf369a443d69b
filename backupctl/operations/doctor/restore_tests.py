# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this host could boot a VM's newest point, as `run` is to do."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from backupctl.errors import BackupctlError, UsageError
from backupctl.finding import Finding
from backupctl.names import VmName
from backupctl.operations import uefi
from backupctl.repository.repository import Repository
from backupctl.system import qemu_tools
from backupctl.vm.trial.options import TrialOptions

_SUBJECT = "restore test"


def of_newest(path: Path, vm: VmName, options: TrialOptions) -> Iterator[Finding]:
    """Look for the QEMU and the firmware. path: the repository's. Never raises.

    What is wrong with the repository or the point itself is not told here.
    """
    program = qemu_tools.system_program()
    if shutil.which(program) is None:
        said = f"not found: {program}, so the restore test of `backupctl run` would fail"
        yield Finding(_SUBJECT, "warning", said, "apt install qemu-system-x86 (or set QEMU_SYSTEM)")
        return
    try:
        point = Repository.open(path).vm(vm).point("latest")
        by_uefi = uefi.of_point(point, options)
    except UsageError as err:
        yield Finding(_SUBJECT, "warning", f"would fail: {err.message}", err.next_command or err.hint)
    except BackupctlError:
        return
    else:
        firmware = f", and {by_uefi.code} for the UEFI variables of {point.id}" if by_uefi else ""
        yield Finding(_SUBJECT, "ok", f"found: {program}{firmware}")
