# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl version`."""

from backupctl.cli import common, output
from backupctl.operations import versions
from backupctl.operations.versions import Component
from backupctl.outcome import documents


@common.command(
    "version",
    0,
    examples=(
        ("The versions of everything, for a report of a problem", "backupctl version"),
        ("The same, for a program", "backupctl version --json"),
    ),
)
@common.json_option
def version(*, as_json: bool) -> None:
    """Show the versions of backupctl, of the libraries that it uses, and of QEMU's tools.

    `backupctl --version` prints its own version only, and is quicker.
    """
    found = versions.components()
    if as_json:
        output.print_json(documents.versions(found))
        return
    output.print_table(("COMPONENT", "VERSION", "PROGRAM"), [_row(one) for one in found])


def _row(one: Component) -> tuple[str, str, str]:
    return one.name, one.version or "not found", one.path or ""
