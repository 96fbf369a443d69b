# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's OVMF: the firmware for UEFI variables, whose build goes by their size (package `ovmf`)."""

from pathlib import Path

from backupctl.errors import UNTOUCHED, UsageError

DIRECTORY = Path("/usr/share/OVMF")
_CODE = {131072: "OVMF_CODE.fd", 540672: "OVMF_CODE_4M.fd"}
"""By the size of the variables. A guest that was installed with Secure Boot needs no other build: its boot
loader is signed, and starts whether or not the firmware checks that. Builds that need SMM are left alone."""
_NAME_ONE = "name a firmware with --firmware, which starts without the VM's variables"


def code_for(variables_bytes: int) -> Path:
    """Return the code that goes with variables of this size. Raises UsageError if there is none here."""
    if (name := _CODE.get(variables_bytes)) is None:
        raise UsageError(
            f"the VM boots by UEFI, and no firmware is known for variables of {variables_bytes} bytes",
            state=UNTOUCHED,
            hint=_NAME_ONE,
        )
    path = DIRECTORY / name
    if path.is_file():
        return path
    message = f"the VM boots by UEFI, and its firmware is not installed here: {path} does not exist"
    if any((DIRECTORY / other).is_file() for other in _CODE.values()):
        raise UsageError(
            message,
            state=UNTOUCHED,
            hint=f"the ovmf that is installed has no build for variables of this size; {_NAME_ONE}",
        )
    raise UsageError(
        message,
        state=UNTOUCHED,
        hint=f"install the package ovmf, or {_NAME_ONE}",
        next_command="apt install ovmf",
    )
