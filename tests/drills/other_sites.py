# SPDX-License-Identifier: GPL-2.0-or-later
"""Sites of drills that the product does not offer: domains of libvirt, VMs that are off, also by ssh."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backupctl.drills.site import VM, expect
from backupctl.drills.sites import DISKS, QemuSite
from fixtures.libvirtd import Domain
from fixtures.sshd import HOST, Sshd
from tests.every_step import SECONDS, storage_daemons
from tests.libvirt_lab import wait_for


@dataclass
class DomainSite(QemuSite):
    """A domain of libvirt that runs."""

    domain: Domain = field(kw_only=True)

    def vm_arguments(self) -> list[str]:
        return self.domain.arguments

    def query(self, command: str, **arguments: Any) -> Any:
        told = json.loads(self.domain.monitor(json.dumps({"execute": command, "arguments": arguments})))
        # Libvirt's jobs are of one transaction, and end with the first of them.
        return told.get("return") if command == "block-job-cancel" else told["return"]

    def restart(self) -> None:
        wait_for(lambda: not self._is_active())
        self.domain.start()

    def end(self, how: str) -> None:
        if how == "quit":
            self.domain.quit()
        else:
            os.kill(self.domain.daemon.qemu(self.domain.name), signal.SIGKILL)

    def snapshot(self, disk: str, size: int) -> None:
        overlay = self.directory / f"over-{disk}.qcow2"
        words = ("--disk-only", "--no-metadata", "--diskspec", f"{disk},file={overlay}")
        self.domain.daemon.virsh("snapshot-create-as", self.domain.name, "s", *words)

    def resize(self, disk: str, size: int) -> None:
        self.domain.daemon.virsh("blockresize", self.domain.name, disk, f"{size}B")
        kept = self._model[disk][:size]
        self._model[disk] = kept + bytes(size - len(kept))

    def check_clean(self) -> None:
        super().check_clean()
        expect(not self.domain.has_job(), "no job of libvirt is left")
        ours = [one for one in self.domain.checkpoints() if one.startswith("backupctl-")]
        expect(len(ours) <= 1, f"backupctl has at most one checkpoint (found: {ours})")

    def close(self) -> None:
        self.domain.close()

    def _is_active(self) -> bool:
        return bool(self.domain.handle().isActive())

    def _io(self, disk: str, command: str) -> None:
        self.domain.io(disk, command)


@dataclass
class ImagesSite(QemuSite):
    """A VM that is off, by its images. The drill writes to them as any program that uses QEMU's code does."""

    def vm_arguments(self) -> list[str]:
        return [word for disk, path in self.images.items() for word in ("--image", f"{disk}={path}")]

    @property
    def images(self) -> dict[str, Path]:
        return {disk: self.directory / f"{disk}.qcow2" for disk in DISKS}

    def write(self, changes: int) -> None:
        wait_for(lambda: not storage_daemons(self.images.values()))  # of a run that was killed
        super().write(changes)

    def check_clean(self) -> None:
        left = [path.name for path in (self.repository / VM).glob("*.partial")]
        left += [path.name for path in self.scratch.iterdir()]
        expect(not left, f"backupctl left nothing behind (found: {', '.join(left)})")
        for disk, path in self.images.items():
            subprocess.run(["qemu-img", "check", "-q", path], check=True, timeout=SECONDS)
            ours = self._bitmaps(path)
            expect(len(ours) <= 1, f"backupctl has at most one bitmap on {disk} (found: {ours})")

    def _bitmaps(self, image: Path) -> list[str]:
        command = ["qemu-img", "info", "--output=json", image]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout)
        stored = told["format-specific"]["data"].get("bitmaps", [])
        return [one["name"] for one in stored if one["name"].startswith("backupctl-")]

    def _io(self, disk: str, command: str) -> None:
        call = ["qemu-io", "-f", "qcow2", "-c", command, str(self.images[disk])]
        subprocess.run(call, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)


@dataclass
class OffDomainSite(ImagesSite):
    """A domain of libvirt that is off."""

    domain: Domain = field(kw_only=True)

    def vm_arguments(self) -> list[str]:
        return self.domain.arguments

    def check_clean(self) -> None:
        super().check_clean()
        noted = [one for one in self.domain.checkpoints() if one.startswith("backupctl-")]
        for disk, path in self.images.items():
            expect(self._bitmaps(path) == noted, f"libvirt notes what {disk} stores ({noted})")

    def close(self) -> None:
        self.domain.close()


def _by_ssh(domain: Domain) -> list[str]:
    socket = f"{domain.daemon.directory}/sock/libvirt-sock"
    return ["--libvirt", f"qemu+ssh://{HOST}/system?socket={socket}", "--domain", domain.name]


@dataclass
class RemoteDomainSite(DomainSite):
    """A domain of libvirt on another host."""

    sshd: Sshd = field(kw_only=True)

    def vm_arguments(self) -> list[str]:
        return _by_ssh(self.domain)


@dataclass
class RemoteOffDomainSite(OffDomainSite):
    """A domain of libvirt on another host that is off."""

    sshd: Sshd = field(kw_only=True)

    def vm_arguments(self) -> list[str]:
        return _by_ssh(self.domain)


@dataclass
class RemoteImagesSite(ImagesSite):
    """A VM on another host that is off, by its images."""

    sshd: Sshd = field(kw_only=True)

    def vm_arguments(self) -> list[str]:
        named = ((disk, self.sshd.address(path)) for disk, path in self.images.items())
        return [word for disk, path in named for word in ("--image", f"{disk}={path}")]
