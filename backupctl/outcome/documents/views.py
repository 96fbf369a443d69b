# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands print with `--json` that only look."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from backupctl.outcome.documents.parts import Document, byte_ranges

if TYPE_CHECKING:  # see `documents`
    from backupctl.operations.bitmaps import StoredBitmap
    from backupctl.operations.diff import DiffReport
    from backupctl.operations.doctor.run import Diagnosis
    from backupctl.operations.report.facts import Report, VmFacts
    from backupctl.operations.status import Status
    from backupctl.operations.usage import VmUsage
    from backupctl.operations.versions import Component
    from backupctl.repository.point import Point
    from backupctl.repository.summary import PointSummary


def status(found: "Status", configuration: str | None) -> Document:
    """Return the state of a VM. configuration: the path of the file in force."""
    return {**asdict(found), "configuration": configuration}


def doctor(found: "Diagnosis", configuration: str | None, report: Path | None = None) -> Document:
    """Return the findings of a doctor.

    configuration: the path of the file in force. report: that of the report that was written.
    """
    return {
        "vm": found.vm,
        "ok": not found.bad,
        "configuration": configuration,
        "findings": [asdict(one) for one in found.findings],
        "report": str(report) if report else None,
    }


def versions(found: "Iterable[Component]") -> Document:
    """Return the versions of everything that is at work."""
    return {"components": [asdict(one) for one in found]}


def report(found: "Report", path: Path, size_bytes: int) -> Document:
    """Return what the page of `report` says, in short. path: the file. size_bytes: its length."""
    return {
        "file": str(path),
        "bytes": size_bytes,
        "made": f"{found.made:%Y-%m-%dT%H:%M:%SZ}",
        "repositories": [
            {"path": one.path, "problem": one.problem, "vms": [_reported(vm) for vm in one.vms]}
            for one in found.repositories
        ],
    }


def report_served(address: str) -> Document:
    """Return where `report --web` serves the page."""
    return {"uri": address}


def _reported(vm: "VmFacts") -> Document:
    return {
        "vm": vm.name,
        "state": vm.verdict.level.name,
        "points": vm.count,
        "damaged": sum(bool(one.broken) for one in vm.points) + sum(not one.unreadable for one in vm.bad),
        "unreadable": sum(one.unreadable for one in vm.bad),
        "stored_bytes": vm.stored_bytes,
        "next_prune_drops": list(vm.dropped),
        "findings": [one.text for one in vm.verdict.findings if one.level],
    }


def point(found: "Point", chain_bytes: int | None) -> Document:
    """Return a point: its manifest under the names of the reports. chain_bytes: what a restore reads."""
    manifest = found.manifest.to_dict()
    return {
        "vm": found.path.parent.name,
        "point": manifest["point"],
        "kind": manifest["kind"],
        "disks_kind": disks_kind(found),
        "parent": manifest["parent"],
        "consistency": manifest["consistency"],
        "frozen_ms": manifest["freeze"]["milliseconds"],
        "start": manifest["start"],
        "end": manifest["end"],
        "qemu": manifest["qemu"],
        "backupctl": manifest["backupctl"],
        "freeze": manifest["freeze"],
        "disks": manifest["disks"],
        "definition": [
            {"name": one.name, "kind": one.kind, "origin": one.origin, "size": one.size}
            for one in found.manifest.definition
        ],
        "protected": found.protected,
        "path": str(found.path),
        "stored_bytes": sum(entry.stored_bytes for entry in found.manifest.disks),
        "chain_bytes": chain_bytes,
    }


def usage(vms: "Sequence[VmUsage]") -> Document:
    """Return what VMs take."""
    return {"vms": [_vm_usage(one) for one in vms], "stored_bytes": sum(one.stored_bytes for one in vms)}


def _vm_usage(found: "VmUsage") -> Document:
    points = [
        {
            "point": one.point.id,
            "kind": disks_kind(one.point),
            "dropped": one.dropped,
            "protected": one.point.protected,
            "image_bytes": one.image_bytes,
            "metadata_bytes": one.metadata_bytes,
            "stored_bytes": one.stored_bytes,
            "alone_bytes": one.alone_bytes,
            "chain_bytes": one.chain_bytes,
        }
        for one in found.points
    ]
    chains = [
        {
            "disk": one.disk,
            "root": one.root,
            "layers": len(one.points),
            "points": list(one.points),
            "stored_bytes": one.stored_bytes,
        }
        for one in found.chains
    ]
    return {
        "vm": found.vm,
        "path": str(found.path),
        "points": points,
        "chains": chains,
        "other_bytes": found.other_bytes,
        "stored_bytes": found.stored_bytes,
    }


def disks_kind(found: "Point | PointSummary") -> str:
    """Return "full", "incremental" or "mixed", by the kinds of a point's disks."""
    kinds = {disk.kind for disk in found.disks}
    return "mixed" if len(kinds) > 1 else str(next(iter(kinds)))


def diff(report: "DiffReport") -> Document:
    """Return what changed between two points."""
    return {
        "vm": report.vm,
        "before": report.before,
        "after": report.after,
        "disks": [
            {
                "name": one.name,
                "size_before": one.size_before,
                "size_after": one.size_after,
                "changed_bytes": one.changed_bytes,
                "ranges": byte_ranges(one.ranges()),
            }
            for one in report.disks
        ],
        "only_before": list(report.only_before),
        "only_after": list(report.only_after),
    }


def bitmaps(vm: str, found: Iterable["StoredBitmap"]) -> Document:
    """Return the bitmaps of a VM."""
    return {"vm": vm, "bitmaps": [asdict(one) for one in found]}
