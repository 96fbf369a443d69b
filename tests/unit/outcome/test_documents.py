# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents of --json: their keys are an interface. One may be added, and none may be renamed or go."""

import json
from pathlib import Path

import numpy as np

from backupctl.errors import DamageFound
from backupctl.events import StepStarted
from backupctl.events.backup import CrashConsistent, DiskSkipped
from backupctl.finding import Finding
from backupctl.names import DiskName, VmName
from backupctl.operations import usage
from backupctl.operations.backup.outcome import RunReport
from backupctl.operations.bitmaps import Removal
from backupctl.operations.diff import DiffReport, DiskDiff
from backupctl.operations.doctor.run import Diagnosis
from backupctl.operations.prune.retention import Decision
from backupctl.operations.prune.run import MergedLayer, PruneReport
from backupctl.operations.recover import Recovered
from backupctl.operations.restore.in_place import InPlaceDisk, InPlaceReport
from backupctl.operations.restore.overlay import OverlayDisk, OverlayReport
from backupctl.operations.restore.selection import MissingDisk
from backupctl.operations.restore.whole import RestoredDisk, RestoreReport
from backupctl.operations.routine.forecast import DiskForecast, Forecast
from backupctl.operations.routine.run import RoutineReport, TaskResult
from backupctl.operations.serve import Export
from backupctl.operations.status import DiskStatus, Status
from backupctl.operations.timers.install import Change
from backupctl.operations.verify.impact import Affected
from backupctl.operations.verify.layer import VerifyScope
from backupctl.operations.verify.run import Damage, Unchecked, VerifyReport
from backupctl.operations.versions import Component
from backupctl.outcome import documents
from tests.screens.test_screens import stored as bitmap
from tests.unit.points import P1, P2, disk_entry

WEB, VDA = VmName("web"), DiskName("vda")
EVENTS = (StepStarted("copy"), DiskSkipped("sr0", "a CD-ROM"), CrashConsistent("no agent"))
DISK_KEYS = (
    "name kind size dirty_bytes copied_bytes zero_bytes unchanged_bytes stored_bytes scanned reason damaged"
)
VERIFY_KEYS = "vms points layers data percent seed read_bytes seconds notes unchecked damage"
PRUNE_KEYS = (
    "vm dry_run rules unused_rules points dropped removed merged left long_chains freed_bytes "
    "freed_is_estimate"
)


def keys(document: object) -> str:
    assert isinstance(document, dict)
    json.dumps(document)  # plain all through
    return " ".join(document)


def test_a_run():
    report = RunReport(
        vm=WEB,
        point=P2,
        kind="incremental",
        parent=P1,
        disks=(disk_entry("vda", parent=P1),),
        frozen_ms=None,
        consistency="crash",
        seconds=1.23456,
        damaged=((P1, VDA),),
        missing_disks=((DiskName("vdb"), P1),),
    )
    document = documents.run(report, EVENTS)
    assert keys(document) == (
        "vm point kind parent disks frozen_ms consistency seconds missing_disks warnings notes"
    )
    assert keys(document["disks"][0]) == DISK_KEYS
    assert (document["disks"][0]["damaged"], document["seconds"]) == ([P1], 1.235)
    assert document["missing_disks"] == [{"name": "vdb", "point": P1}]
    assert [(one["code"], one["reason"]) for one in document["warnings"]] == [
        ("crash-consistent", "no agent")
    ]
    assert [(one["code"], one["disk"]) for one in document["notes"]] == [("disk-skipped", "sr0")]


def test_a_recover():
    document = documents.recover(WEB, Recovered(("thawed",)), EVENTS)
    assert keys(document) == "vm actions warnings notes"
    assert (document["actions"], len(document["warnings"]), len(document["notes"])) == (["thawed"], 1, 1)


def test_a_status():
    disk = DiskStatus(VDA, "node", 1, None, "none", "full", "new")
    document = documents.status(Status(WEB, (P1,), (), "10.0.2", "", (disk,), (), "full"), None)
    assert keys(document) == (
        "vm points damaged qemu problem disks leftovers next_run missing_disks bitmaps refusal "
        "running other_tools gone configuration"
    )
    assert keys(document["disks"][0]) == "name node size bitmap bitmap_state next reason"


def test_a_doctor():
    found = Diagnosis(WEB, (Finding("agent", "bad", "no agent", "start it"),))
    document = documents.doctor(found, "/etc/x")
    assert keys(document) == "vm ok configuration findings report"
    assert document["ok"] is False
    assert keys(document["findings"][0]) == "subject verdict said advice"


def test_the_versions():
    document = documents.versions((Component("qemu-img", "10.0", "/usr/bin/qemu-img"),))
    assert keys(document) == "components"
    assert keys(document["components"][0]) == "name version path"


def test_a_verify():
    affected = Affected(P2, VDA, ((0, 512),))
    damage = Damage(WEB, "data", Path("/r/x"), "vda", "spoilt", ((0, 512),), (affected,))
    unchecked = Unchecked(WEB, Path("/r/y"), "", "no rights")
    report = VerifyReport((WEB,), 1, 2, 3, (damage,), ("a note",), 1.0, (unchecked,))
    document = documents.verify(report, VerifyScope(percent=10.0, seed=7))
    assert keys(document) == VERIFY_KEYS
    assert keys(document["damage"][0]) == "vm kind path disk message ranges touches"
    assert document["damage"][0]["touches"] == [
        {"point": P2, "disk": "vda", "ranges": [{"offset": 0, "length": 512}]}
    ]
    assert document["unchecked"] == [{"vm": "web", "path": "/r/y", "disk": None, "message": "no rights"}]
    assert (document["percent"], document["seed"]) == (10.0, 7)
    assert documents.verify(report, VerifyScope(data=False))["percent"] == 0
    assert documents.verify(report, VerifyScope())["seed"] is None


def test_a_prune():
    report = PruneReport(
        (Decision(P1, False, ("no rule holds it",)),), (P1,), (P1,), (MergedLayer(P2, VDA, P1, 512),)
    )
    document = documents.prune(WEB, report, {"keep_last": 1}, {}, dry_run=False)
    assert keys(document) == PRUNE_KEYS
    assert keys(document["points"][0]) == "point keep reasons freed_bytes"
    assert keys(document["merged"][0]) == "point disk below written_bytes"
    failed = {"db": DamageFound("spoilt")}
    everything = documents.prune_all([document], {"shop": "no points"}, failed, dry_run=False)
    assert keys(everything) == "dry_run vms skipped failed"
    assert everything["skipped"] == [{"vm": "shop", "reason": "no points"}]
    assert keys(everything["failed"][0]["error"]) == "kind message step state hint next exit_code"
    assert keys(documents.protection(WEB, P1, protected=True)) == "vm point protected"


def test_a_routine():
    backup = RunReport(WEB, P2, "incremental", P1, (disk_entry("vda", parent=P1),), None, "crash", 1.0)
    prune = PruneReport((Decision(P1, False, ("no rule holds it",)),), (P1,))
    verify = VerifyReport((WEB,), 1, 2, 3, (), (), 1.0)
    tasks = (
        TaskResult("backup", backup),
        TaskResult("prune", prune, DamageFound("spoilt")),
        TaskResult("verify", verify, scope=VerifyScope(percent=10.0)),
    )
    document = documents.routine(WEB, RoutineReport(tasks, 2.0), EVENTS, {"prune": "/tmp/x.log"})
    assert keys(document) == "vm exit_code seconds tasks error warnings notes"
    assert (document["exit_code"], len(document["warnings"]), len(document["notes"])) == (4, 1, 1)
    assert keys(document["tasks"][0]) == "task outcome reason report error"
    assert [(one["task"], one["outcome"]) for one in document["tasks"]] == [
        *(("backup", "done"), ("prune", "failed"), ("verify", "done"))
    ]
    reports = [keys(one["report"]) for one in document["tasks"]]
    assert reports == [
        "point kind parent disks frozen_ms consistency seconds missing_disks",
        "points dropped removed merged left long_chains freed_bytes",
        "points layers data percent seed read_bytes seconds notes unchecked damage",
    ]
    assert document["tasks"][1]["error"]["log"] == "/tmp/x.log"
    skipped = documents.routine(WEB, RoutineReport((TaskResult("prune", skipped="no rule"),), 0.0), (), {})
    assert (skipped["tasks"][0]["outcome"], skipped["tasks"][0]["reason"]) == ("skipped", "no rule")
    assert keys(documents.routine_failed(WEB, None)) == keys(document)
    assert keys(documents.routines([document], 1.0, 4, dry_run=False)) == "dry_run exit_code seconds vms"


def test_a_forecast():
    disk = DiskForecast(VDA, "incremental", "", 65536)
    document = documents.forecast(WEB, Forecast("incremental", False, (disk,), (P1,), 0.0))
    assert keys(document) == "vm exit_code seconds tasks error warnings notes"
    assert [one["outcome"] for one in document["tasks"]] == ["planned", "planned", "skipped"]
    assert keys(document["tasks"][0]["report"]) == "kind full_due most_bytes disks"
    assert keys(document["tasks"][0]["report"]["disks"][0]) == "name how reason most_bytes"
    assert document["tasks"][1]["report"] == {"dropped": [P1]}
    for due, outcome in ((True, "planned"), (False, "skipped")):
        found = Forecast("incremental", False, (disk,), (P1,), 0.0, due)
        assert documents.forecast(WEB, found)["tasks"][3]["outcome"] == outcome


def test_what_a_command_for_several_vms_came_to():
    document = documents.each([documents.of_each(WEB, {"x": 1}, DamageFound("spoilt"))])
    assert keys(document) == "vms"
    assert keys(document["vms"][0]) == "vm exit_code report error"
    assert (document["vms"][0]["exit_code"], document["vms"][0]["report"]) == (4, {"x": 1})


def test_a_point(builder):
    builder.point(P1, (disk_entry("vda"), [(0, b"x")]))
    builder.point(P2, (disk_entry("vda", parent=P1), [(0, b"y")]), (disk_entry("vdb"), [(0, b"z")]))
    first, second = builder.directory.points()
    document = documents.point(second, 5)
    assert keys(document) == (
        "vm point kind disks_kind parent consistency frozen_ms start end qemu backupctl freeze disks "
        "definition protected path stored_bytes chain_bytes"
    )
    assert [documents.disks_kind(one) for one in (first, second)] == ["full", "mixed"]


def test_what_vms_take(builder):
    builder.point(P1, (disk_entry("vda"), [(0, b"x")]))
    document = documents.usage([usage.measure(builder.directory)])
    assert keys(document) == "vms stored_bytes"
    (vm,) = document["vms"]
    assert keys(vm) == "vm path points chains other_bytes stored_bytes"
    assert keys(vm["points"][0]) == (
        "point kind dropped protected image_bytes metadata_bytes stored_bytes alone_bytes chain_bytes"
    )
    assert keys(vm["chains"][0]) == "disk root layers points stored_bytes"


def test_a_diff():
    disk = DiskDiff(VDA, 65536 * 3, 65536 * 4, np.array([True, True, False, True]))
    document = documents.diff(DiffReport(WEB, P1, P2, (disk,), (), (DiskName("vdb"),)))
    assert keys(document) == "vm before after disks only_before only_after"
    assert keys(document["disks"][0]) == "name size_before size_after changed_bytes ranges"
    assert document["disks"][0]["ranges"] == [
        {"offset": 0, "length": 131072},
        {"offset": 196608, "length": 65536},
    ]


def test_the_restores():
    missing = (MissingDisk(DiskName("vdb"), P1),)
    whole = RestoredDisk(VDA, "out.raw", "raw", 512, 1.5, ((0, 512),), "", P1)
    placed = InPlaceDisk(VDA, Path("out.raw"), "raw", 512, 0, 512, 1.5, P1)
    overlay = OverlayDisk(VDA, Path("out.qcow2"), 512, Path("/r/vda.qcow2"), P1)
    made = {
        "name point path format size seconds damaged unproven": documents.restore(
            RestoreReport(WEB, P1, (whole,), missing)
        ),
        "name point path format size written_bytes same_bytes seconds": documents.restore_in_place(
            InPlaceReport(WEB, P1, (placed,), missing)
        ),
        "name point path size backing": documents.overlay(OverlayReport(WEB, P1, (overlay,), missing)),
    }
    for wanted, document in made.items():
        assert keys(document) == "vm point disks missing"
        assert keys(document["disks"][0]) == wanted
        assert document["missing"] == [{"name": "vdb", "point": P1}]


def test_a_serve():
    document = documents.served(WEB, P1, [Export(VDA, "nbd://localhost/vda", 512, writable=False)])
    assert keys(document) == "vm point exports"
    assert keys(document["exports"][0]) == "disk uri size writable"


def test_bitmaps():
    one = bitmap("backupctl-0123abcd-x-vda", "orphan", "no repository has it")
    listed = keys(documents.bitmaps(WEB, [one])["bitmaps"][0])
    assert listed.startswith("name node disk point repository known this_repository granularity")
    done = Removal(WEB, (one,), ((one, "it is in use"),))
    for dry_run, (removed, would) in {False: (1, 0), True: (0, 1)}.items():
        document = documents.bitmaps_removed(done, dry_run=dry_run)
        assert keys(document) == "vm dry_run removed would_remove left"
        assert (len(document["removed"]), len(document["would_remove"])) == (removed, would)
        assert keys(document["left"][0]) == f"{listed} reason"


def test_timers():
    changes = [Change(Path("/u"), "create", b"[Timer]\n"), Change(Path("/v"), "remove")]
    document = documents.timers(changes, ["systemctl daemon-reload"], dry_run=True)
    assert keys(document) == "dry_run units commands"
    assert [keys(one) for one in document["units"]] == ["path action content"] * 2
    assert [one["content"] for one in document["units"]] == ["[Timer]\n", None]
