# SPDX-License-Identifier: GPL-2.0-or-later
"""Which domains a libvirt has, and which of them are backed up already."""

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backupctl.errors import InvalidName
from backupctl.names import VmName, vm_name
from backupctl.options import DEFAULT_TIMEOUTS, Timeouts
from backupctl.vm.open_driver import domains

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]", re.ASCII)


@dataclass(frozen=True)
class FoundDomain:
    """A domain. configured_as: the VMs of the configuration that are this domain."""

    domain: str
    running: bool
    configured_as: tuple[str, ...]


def discover(
    uri: str,
    patterns: Sequence[str],
    configured: Mapping[tuple[str, str], tuple[str, ...]],
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
) -> tuple[FoundDomain, ...]:
    """Return the domains whose names match one of the patterns; all if there are none.

    configured: the VMs of the configuration, by URI and domain. Raises MonitorError.
    """
    return tuple(
        FoundDomain(name, running, configured.get((uri, name), ()))
        for name, running in domains(uri, timeouts)
        if not patterns or any(fnmatch.fnmatchcase(name, one) for one in patterns)
    )


def configuration_of(uri: str, found: Sequence[FoundDomain]) -> str:
    """Return tables for the configuration file, for the domains that are not in it."""
    taken: set[str] = {name for one in found for name in one.configured_as}
    made = []
    for one in found:
        if one.configured_as:
            continue
        name = _free_name(one.domain, taken)
        taken.add(name)
        lines = [f"[vm.{json.dumps(name)}]", f"libvirt = {json.dumps(uri)}"]
        if name != one.domain:
            lines.append(f"domain = {json.dumps(one.domain)}")
        made.append("\n".join(lines))
    return "\n\n".join(made)


def _free_name(domain: str, taken: set[str]) -> VmName:
    """Return a name for a VM that is not taken: the domain's own, as far as it can be a VM's."""
    text = _UNSAFE.sub("_", domain)[:90]
    number = 1
    while True:
        try:
            name = vm_name(text if number == 1 else f"{text}-{number}")
        except InvalidName:
            text = f"vm-{text}".removesuffix(".partial")
            name = vm_name(text)
        if name not in taken:
            return name
        number += 1
