# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands print with `--json` that give data back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from backupctl.outcome.documents.parts import Document, byte_ranges, error

if TYPE_CHECKING:  # see `documents`
    from backupctl.filesystems.tree import Node
    from backupctl.operations.files.extract import ExtractReport
    from backupctl.operations.files.run import Found, Place
    from backupctl.operations.mount import MountedDisk
    from backupctl.operations.restore.define import DefineReport
    from backupctl.operations.restore.definition import RestoredFile
    from backupctl.operations.restore.in_place import InPlaceReport
    from backupctl.operations.restore.overlay import OverlayReport
    from backupctl.operations.restore.whole import RestoreReport
    from backupctl.operations.restore_test import RestoreTestReport
    from backupctl.operations.serve import Export


def restore(report: "RestoreReport") -> Document:
    """Return what a whole restore made."""
    disks = [
        {
            "name": one.name,
            "point": one.point,
            "path": one.path,
            "format": one.format,
            "size": one.size,
            "seconds": round(one.seconds, 3),
            "damaged": byte_ranges(one.damaged),
            "unproven": one.unverified or None,
        }
        for one in report.images
    ]
    return _restored(report, disks)


def with_definition(document: Document, files: "Sequence[RestoredFile]") -> Document:
    """Return what a restore made, with the files that describe the VM."""
    listed = [
        {"kind": one.kind, "path": str(one.path), "origin": one.origin, "size": one.size} for one in files
    ]
    return {**document, "definition": listed}


def defined(document: Document, report: "DefineReport") -> Document:
    """Return what a restore made, with the domain that it defined."""
    variables = str(report.variables) if report.variables else None
    return {**document, "domain": {"name": report.domain, "uuid": report.uuid, "variables": variables}}


def restore_in_place(report: "InPlaceReport") -> Document:
    """Return what a restore with --only-changed wrote."""
    disks = [
        {
            "name": one.name,
            "point": one.point,
            "path": str(one.path),
            "format": one.format,
            "size": one.size,
            "written_bytes": one.written_bytes,
            "same_bytes": one.same_bytes,
            "seconds": round(one.seconds, 3),
        }
        for one in report.images
    ]
    return _restored(report, disks)


def overlay(report: "OverlayReport") -> Document:
    """Return what a restore with --thin made."""
    disks = [
        {
            "name": one.name,
            "point": one.point,
            "path": str(one.path),
            "size": one.size,
            "backing": str(one.backing),
        }
        for one in report.images
    ]
    return _restored(report, disks)


def _restored(report: "RestoreReport | InPlaceReport | OverlayReport", disks: list[Document]) -> Document:
    missing = [{"name": one.name, "point": one.point} for one in report.missing]
    return {"vm": report.vm, "point": report.point, "disks": disks, "missing": missing}


def served(vm: str, point_id: str, exports: Iterable["Export"]) -> Document:
    """Return where the disks of a point are served."""
    listed = [
        {"disk": one.disk, "uri": one.uri, "size": one.size, "writable": one.writable} for one in exports
    ]
    return {"vm": vm, "point": point_id, "exports": listed}


def places(found: Iterable["Place"]) -> Document:
    """Return the partitions of a point's disks, and what they hold."""
    return {
        "file_systems": [
            {
                "disk": one.disk or None,
                "partition": one.number,
                "volume": one.volume or None,
                "size": one.size,
                "kind": one.kind or None,
                "problem": one.problem or None,
                "warnings": list(one.warnings),
            }
            for one in found
        ]
    }


def guest_files(listed: Iterable[tuple["Found", Iterable[tuple[bytes, "Node"]]]]) -> Document:
    """Return what is at some paths of a guest."""
    return {
        "paths": [
            {
                "path": _text(found.path),
                "disk": found.place.disk or None,
                "partition": found.place.number,
                "volume": found.place.volume or None,
                "entries": [_guest_file(name, node) for name, node in entries],
            }
            for found, entries in listed
        ]
    }


def _guest_file(name: bytes, node: "Node") -> Document:
    return {
        "name": _text(name),
        "kind": node.kind,
        "mode": f"{node.mode:04o}",
        "owner": node.owner,
        "group": node.group,
        "size": node.size,
        "modified": node.modified,
    }


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def extracted(report: "ExtractReport") -> Document:
    """Return what was copied out of a point."""
    return {
        "target": str(report.target),
        "files": report.files,
        "directories": report.directories,
        "data_bytes": report.data_bytes,
        "skipped_count": report.skipped_count,
        "skipped": [asdict(one) for one in report.skipped],
    }


def restore_test(report: "RestoreTestReport", kept: Mapping[str, Path]) -> Document:
    """Return what a restore test came to. kept: the files that show it."""
    return {
        "vm": report.vm,
        "point": report.point,
        "passed": report.passed,
        "until": report.until,
        "seconds": round(report.seconds, 3),
        "accelerator": report.accelerator,
        "error": error(report.error) if report.error else None,
        "screenshot": str(kept["screenshot"]) if "screenshot" in kept else None,
        "console": str(kept["console"]) if "console" in kept else None,
    }


def mounted(vm: str, point_id: str, disks: Iterable["MountedDisk"]) -> Document:
    """Return where the disks of a point are mounted."""
    listed = [{"disk": one.disk, "path": str(one.path), "size": one.size} for one in disks]
    return {"vm": vm, "point": point_id, "mounted": listed}
