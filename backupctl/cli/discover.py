# SPDX-License-Identifier: GPL-2.0-or-later
"""`backupctl discover`."""

from collections import defaultdict
from dataclasses import asdict

import click
from click.core import ParameterSource

from backupctl.cli import common, output, param_types, vm_argument
from backupctl.cli.invocation import Invocation
from backupctl.operations import discover as core
from backupctl.options import DEFAULT_TIMEOUTS, Timeouts


@common.command(
    "discover",
    0,
    1,
    2,
    examples=(
        ("All domains of libvirt, and which are configured", "backupctl discover"),
        ("Those of another host", "backupctl discover --libvirt qemu+ssh://root@vmhost/system"),
        ("Tables for the configuration, for those that are not", "backupctl discover 'web*' --toml"),
    ),
)
@click.pass_context
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option(
    "--libvirt",
    type=param_types.LIBVIRT_URI,
    metavar="URI",
    default="qemu:///system",
    show_default=True,
    help="Where libvirt is.",
)
@click.option("--toml", is_flag=True, help="Print tables for the configuration file.")
@vm_argument.timeout(
    "--command-timeout", "one call of libvirt may take", DEFAULT_TIMEOUTS.brief().command_seconds
)
@common.config_option
@common.json_option
def discover(
    context: click.Context,
    /,
    *,
    patterns: tuple[str, ...],
    libvirt: str,
    toml: bool,
    command_timeout: float,
    config: str | None,  # noqa: ARG001 - the invocation has read it
    as_json: bool,
) -> None:
    """List the domains of libvirt, and as which VMs they are configured.

    PATTERN may contain wildcards: 'web*'.
    """
    content = Invocation.of(context).config.content
    configured: defaultdict[tuple[str, str], tuple[str, ...]] = defaultdict(tuple)
    for name, said in content.vm.items():
        if said.libvirt:
            configured[said.libvirt, said.domain or name] += (name,)
    if context.get_parameter_source("command_timeout") is ParameterSource.DEFAULT:
        command_timeout = content.defaults.command_timeout or command_timeout
    found = core.discover(libvirt, patterns, configured, Timeouts(command_seconds=command_timeout))
    if as_json:
        output.print_json({"libvirt": libvirt, "domains": [asdict(one) for one in found]})
    elif toml:
        for line in core.configuration_of(libvirt, found).splitlines():
            output.print_line(line)
    else:
        output.print_table(
            ("DOMAIN", "STATE", "CONFIGURED AS"),
            [
                (one.domain, "running" if one.running else "off", ", ".join(one.configured_as) or "-")
                for one in found
            ],
        )
