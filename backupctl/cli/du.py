# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl du`."""

from collections.abc import Iterable, Sequence

from backupctl.cli import common, output, units, vm_argument
from backupctl.cli.target import Target
from backupctl.errors import BackupctlError
from backupctl.operations import usage
from backupctl.operations.usage import PointUsage, VmUsage
from backupctl.outcome import documents
from backupctl.progress import counted


@common.command(
    "du",
    0,
    1,
    2,
    examples=(
        ("What each point of a VM takes, and what removing it would free", "backupctl du web"),
        ("All VMs, for a program", "backupctl du --json"),
    ),
)
@vm_argument.Named(needs_vm=False, optional=True, several=True)
@common.json_option
def du(target: Target, *, as_json: bool) -> None:
    """Show what VMs take in the repository: in all, by chain and by point, with metadata.

    ALONE is about what removing that point alone would free: what others depend on is merged into them, so
    only what they hide of it goes. CHAIN is what a restore of the point reads.
    """
    found: list[VmUsage] = []
    failures: list[BackupctlError] = []
    for path, names in target.by_repository().items():
        try:
            repository = target.open(path)
            vms = [vm for name in names for vm in ([name] if name else repository.vms())]
            for vm in vms:
                directory = repository.vm(vm)
                directory.refuse_unknown()
                found.append(usage.measure(directory))
        except BackupctlError as err:
            failures.append(err)
    if as_json and (found or not failures):
        output.print_json(documents.usage(found))
    elif found:
        _show(found)
    elif not failures:
        output.print_line("no recovery points")
    if failures:
        raise common.worst(failures)


def _show(found: Sequence[VmUsage]) -> None:
    for one in found:
        output.print_line(
            f"{one.vm}: {units.size(one.stored_bytes)}: {counted(len(one.points), 'point')}, and "
            f"{units.size(one.other_bytes)} of other files"
        )
        output.print_table(
            ("  POINT", "KIND", "IMAGES>", "METADATA>", "STORED>", "ALONE>", "CHAIN>", ""), _rows(one.points)
        )
        output.print_table(
            ("  DISK", "SINCE FULL", "LAYERS>", "STORED>"),
            [
                (f"  {chain.disk}", chain.root, len(chain.points), units.size(chain.stored_bytes))
                for chain in one.chains
            ],
        )
    if len(found) > 1:
        total = units.size(sum(one.stored_bytes for one in found))
        output.print_line(f"{counted(len(found), 'VM')}: {total}")


def _rows(points: Iterable[PointUsage]) -> list[tuple[object, ...]]:
    return [
        (
            f"  {one.point.id}",
            documents.disks_kind(one.point),
            units.size(one.image_bytes),
            units.size(one.metadata_bytes),
            units.size(one.stored_bytes),
            _known(one.alone_bytes),
            _known(one.chain_bytes),
            "dropped; others depend on it" if one.dropped else "protected" if one.point.protected else "",
        )
        for one in points
    ]


def _known(count: int | None) -> str:
    return "?" if count is None else units.size(count)
