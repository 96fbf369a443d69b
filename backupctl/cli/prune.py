# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl prune`, `backupctl protect` and `backupctl unprotect`."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from backupctl import prune as core
from backupctl.cli import common, screen, units
from backupctl.errors import DamageFound
from backupctl.names import vm_name
from backupctl.prune import PruneReport
from backupctl.report import Stop
from backupctl.repository import retention
from backupctl.repository.retention import Decision, Rules

_COUNTED = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_HELP = {"last": "Keep the N newest points."}


def _rules(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--keep-within",
        metavar="DURATION",
        help="Keep what is no older than this before the newest: 36h, 7d, 1y6m.",
    )(command)
    for name in reversed(_COUNTED):
        text = _HELP.get(
            name, f"Keep the newest point of each of the last N {name} periods that have one (UTC)."
        )
        option = click.option(f"--keep-{name}", type=click.IntRange(min=0), metavar="N", help=text)
        command = option(command)
    return command


@click.command(epilog=common.exit_help(0, 1, 2, 4, 75))
@common.named(needs_vm=False)
@_rules
@click.option("--dry-run", is_flag=True, help="Only show which points would stay or go, and why.")
@click.option(
    "--max-chain",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tell which disks of the points that stay still need more than N layers.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@common.quiet
@click.pass_context
def prune(context: click.Context, /, **options: Any) -> None:
    """Drop the points of a VM that no rule holds; all others stay whole.

    A point stays if any rule holds it. The newest always stays, the newest that holds each disk, and
    protected ones. The VM is not touched. What a prune could not finish the next one does.
    """
    names = common.take(context, options)

    def setting(name: str) -> Any:
        given = options[name]
        return names.config.setting(names.name, name) if given is None else given

    within = setting("keep_within")
    rules = Rules(
        **{name: int(setting(f"keep_{name}") or 0) for name in _COUNTED},
        within=retention.duration(str(within)) if within else None,
    )
    folder = names.repository().vm(vm_name(names.name or ""))
    if options["dry_run"]:
        report = PruneReport(
            core.plan(folder, rules), long_chains=core.long_chains(folder, options["max_chain"])
        )
    else:
        stop = Stop()
        with stop.on_signals(), screen.reporter(quiet=options["quiet"]) as reporter:
            report = core.prune(folder, rules, reporter, stop, options["max_chain"])
    if options["as_json"]:
        screen.print_json(_document(folder.name, report, dry_run=options["dry_run"]))
    elif not options["quiet"]:
        _print(report, dry_run=options["dry_run"])
    if report.damage:
        raise DamageFound(
            "; ".join(report.damage),
            state="the points that stay are as they were; what is damaged is not merged",
            next_command=f"backupctl verify {folder.name}",
        )


def _document(vm: str, report: PruneReport, *, dry_run: bool) -> dict[str, Any]:
    return {
        "vm": vm,
        "dry_run": dry_run,
        "points": [_decision(one) for one in report.decisions],
        "dropped": list(report.dropped),
        "removed": list(report.removed),
        "merged": [asdict(one) for one in report.merged],
        "left": list(report.left),
        "long_chains": list(report.long_chains),
    }


def _decision(one: Decision) -> dict[str, Any]:
    return {"point": one.point, "keep": one.keep, "reasons": list(one.reasons)}


def _print(report: PruneReport, *, dry_run: bool) -> None:
    rows = [(one.point, "keep" if one.keep else "drop", "; ".join(one.reasons)) for one in report.decisions]
    screen.print_table(("POINT", "", "WHY"), rows)
    for text in report.long_chains:
        screen.print_line(f"longer than --max-chain: {text}")
    if dry_run:
        screen.print_line(f"{len(retention.dropped(report.decisions))} would go; nothing was touched")
        return
    written = units.size(sum(one.written_bytes for one in report.merged))
    screen.print_line(
        f"dropped {len(report.dropped)}, merged {len(report.merged)} layers ({written} written), "
        f"left {len(report.left)} for the next prune"
    )


def _switch(change: Callable[..., Any], said: str) -> Callable[..., None]:
    def run(context: click.Context, /, **options: Any) -> None:
        names = common.take(context, options)
        point = change(names.repository().vm(vm_name(names.name or "")), options["point"])
        if options["as_json"]:
            screen.print_json({"vm": names.name, "point": point, "protected": change is core.protect})
        else:
            screen.print_line(f"{names.name} {point}: {said}")

    return run


def _command(name: str, run: Callable[..., None], text: str) -> click.Command:
    made = click.pass_context(run)
    made = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(made)
    made = click.argument("point")(made)
    made = common.named(needs_vm=False)(made)
    return click.command(name, help=text, epilog=common.exit_help(0, 1, 2, 4, 75))(made)


protect = _command(
    "protect",
    _switch(core.protect, "protected; no prune drops it"),
    "Have prune never drop POINT (an id, or `latest`), until `unprotect`.",
)
unprotect = _command(
    "unprotect",
    _switch(core.unprotect, "not protected any more"),
    "Let prune drop POINT again, if no rule holds it.",
)
