# SPDX-License-Identifier: GPL-2.0-or-later
"""Prometheus's text format, and a file of it that a node_exporter's textfile collector reads.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/. There are no time stamps in it:
the collector refuses them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backupctl.system import safe_directory

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_READABLE = 0o644


@dataclass(frozen=True)
class Gauge:
    """One metric with one value. labels: their values by their names."""

    name: str
    help: str
    labels: Mapping[str, str]
    value: float


def text(gauges: Iterable[Gauge]) -> str:
    """Return the text of a file: all samples of one metric together, as the format asks for."""
    by_name: dict[str, list[Gauge]] = {}
    for one in gauges:
        by_name.setdefault(one.name, []).append(one)
    return "".join([_lines(name, found) for name, found in by_name.items()])


def _lines(name: str, gauges: Sequence[Gauge]) -> str:
    samples = "".join([f"{name}{_labels(one.labels)} {_number(one.value)}\n" for one in gauges])
    return f"# HELP {name} {gauges[0].help}\n# TYPE {name} gauge\n{samples}"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def file_of(configured: Path, vm: str) -> tuple[Path, str]:
    """Return the directory and the name of a VM's own file.

    configured: that directory, or a file in it, `NAME.prom`, which becomes NAME-VM.prom. Each VM has a file
    of its own, so that runs at the same time never overwrite what another one wrote.
    """
    if configured.suffix == ".prom":
        return configured.parent, f"{configured.stem}-{vm}.prom"
    return configured, f"backupctl-{vm}.prom"


def write(directory: Path, name: str, content: str) -> None:
    """Replace a file, which is the old or the new one at any time. Raises OSError, UsageError."""
    temporary = f".{name}.new"  # the collector reads *.prom only
    # It may be the collector's own: whoever owns it can only read and remove what is in it.
    with safe_directory.opened_where_it_is(directory) as descriptor:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=descriptor)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=descriptor), "wb") as file:
            file.write(content.encode())
            # The collector runs as a user of its own. The file names VMs, times and sizes, and nothing else.
            os.fchmod(file.fileno(), _READABLE)
        os.rename(temporary, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
