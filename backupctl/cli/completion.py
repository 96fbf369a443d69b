# SPDX-License-Identifier: GPL-2.0-or-later
"""What the shell offers for completion: VMs of the configuration, points of the repository.

A shell in which something is wrong completes nothing, and shows no error: that is left to the command.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from backupctl.cli import param_types
from backupctl.cli.invocation import Invocation
from backupctl.errors import BackupctlError
from backupctl.names import vm_name
from backupctl.repository import point_names


def vms(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the VMs of the configuration whose names begin so."""
    with suppress(BackupctlError, OSError):
        return _beginning(incomplete, Invocation.of(context).config.vms)
    return []


def vms_then_points(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return VMs; and behind the first of them points, too."""
    named = vms(context, parameter, incomplete)
    return [*points(context, parameter, incomplete), *named] if context.params.get("name") else named


def points(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the points of the VM that was typed whose names begin so, newest first, and `latest`."""
    name = context.params.get("name")
    with suppress(BackupctlError, OSError):
        if name:
            typed = context.params.get("repository")
            configured = Invocation.of(context).config.of(name).repository
            place = typed or (param_types.absolute(configured) if configured else None)
            ids = _ids(place, name) if place else ()
            back = (f"{point_names.LATEST}~{number}" for number in range(1, len(ids)))
            relative = back if incomplete.startswith(f"{point_names.LATEST}~") else ()
            return _beginning(incomplete, (point_names.LATEST, *relative, *ids))
    return []


def point_ids(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the points of the VM that was typed whose ids begin so, newest first."""
    return [one for one in points(context, parameter, incomplete) if point_names.is_id(one.value)]


def _ids(place: Path, name: str) -> list[str]:
    from backupctl.repository.repository import Repository  # noqa: PLC0415 - each command loads this module

    directory = Repository.open(place).vm(vm_name(name))
    return [point.id for point in reversed(directory.scan_points(tolerant=True).points)]


def _beginning(incomplete: str, names: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
