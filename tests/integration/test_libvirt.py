# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of libvirt, by its own backup API: a libvirtd of the test's own, domains without an OS."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fixtures.debian import CannotBeHad
from fixtures.libvirtd import Domain, Libvirtd
from fixtures.writer import Writer
from tests.conftest import MIB, ROOT, Cli

libvirt = pytest.importorskip("libvirt", reason="python3-libvirt is not installed")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Libvirtd]:
    try:
        made = Libvirtd(small=True)
        with made:
            yield made
    except CannotBeHad as err:
        pytest.skip(str(err))


@dataclass
class Lab:
    """A domain, its writer, and the command line for it."""

    domain: Domain
    writer: Writer
    cli: Cli
    directory: Path

    def backup(self, kind: str, *options: str, code: int = 0) -> Any:
        return self.cli.json(kind, "web", *options, code=code)

    def assert_point(self, point: str, moment: dict[str, bytes]) -> None:
        for disk, content in moment.items():
            assert self.cli.raw(point, disk, self.directory) == content, f"{disk} of {point}"

    def assert_clean(self, checkpoints: int = 1) -> None:
        """Nothing of ours is left in the domain but checkpoints, and nothing on the disk but points."""
        assert not self.domain.has_job()
        assert self.domain.is_running()
        ours = [one for one in self.domain.checkpoints() if one.startswith("backupctl-")]
        assert len(ours) == checkpoints, ours
        assert list(self.cli.scratch.iterdir()) == []
        partial = [one for one in os.listdir(self.cli.repository / "web") if one.endswith(".partial")]
        assert partial == []

    def next_is_right(self) -> None:
        """After whatever happened: an incremental is byte-equal, and nothing is left."""
        self.writer.write(5)
        self.writer.remember()
        report = self.backup("incremental")
        self.assert_point(report["point"], self.writer.moment)
        self.assert_clean()


Make = Callable[..., Lab]


@pytest.fixture
def make_lab(daemon: Libvirtd, tmp_path: Path, held: ExitStack, request: pytest.FixtureRequest) -> Make:
    def make(
        sizes: dict[str, int] | None = None, *, formats: dict[str, str] | None = None, driver: str = ""
    ) -> Lab:
        sizes = sizes or {"vda": 8 * MIB, "vdb": 4 * MIB}
        disks = []
        for name, size in sizes.items():
            kind = (formats or {}).get(name, "qcow2")
            path = tmp_path / f"{name}.{kind}"
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, str(size)], check=True, timeout=30)
            disks.append({"target": name, "path": path, "format": kind, "driver": driver})
        domain = Domain(daemon, f"d{abs(hash(request.node.nodeid)) % 10**8}", disks)
        held.callback(domain.close)
        domain.start()
        (tmp_path / "scratch").mkdir()
        cli = Cli(
            repository=tmp_path / "repository",
            environment={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
            scratch=tmp_path / "scratch",
            vm=domain.arguments,
        )
        writer = Writer(sizes, domain.io, 1)
        held.callback(writer.stop)
        return Lab(domain, writer, cli, tmp_path)

    return make


def kinds(report: Any) -> dict[str, str]:
    return {disk["name"]: "scan" if disk["scanned"] else disk["kind"] for disk in report["disks"]}


def test_a_full_and_incrementals_are_byte_equal(make_lab: Make) -> None:
    lab = make_lab({"vda": 8 * MIB, "vdb": 4 * MIB, "vdc": 2 * MIB}, formats={"vdc": "raw"})
    lab.writer.write(30)
    lab.writer.remember()
    first, begun = lab.backup("full"), lab.writer.moment
    lab.assert_clean()
    lab.writer.write(10)
    lab.writer.remember()
    second, then = lab.backup("incremental"), lab.writer.moment
    assert kinds(second) == {"vda": "incremental", "vdb": "incremental", "vdc": "scan"}
    lab.assert_point(first["point"], begun)
    lab.assert_point(second["point"], then)
    lab.next_is_right()
