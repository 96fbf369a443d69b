# SPDX-License-Identifier: GPL-2.0-or-later
"""The file system of a remote host: see `vm.qmp.files.Files`."""

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backupctl.errors import Failed, MonitorError
from backupctl.names import Namespace, VmName
from backupctl.system.bounded_read import Unusable
from backupctl.vm.filling import Filling
from backupctl.vm.libvirt.run_directory import QemuUser
from backupctl.vm.qmp import reply
from backupctl.vm.qmp.scratch_file import Made
from backupctl.vm.remote.channel import Channel

_MOST_BYTES = (1 << 63) - 1
_MOST_PATH = 8192
_AGAIN_SECONDS = 1.0
_PART_BYTES = 1 << 20


class RemoteFiles:
    """See `Files`. Each call asks the program there, and raises MonitorError if it cannot be reached."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def check_directory(self, directory: Path) -> None:
        """Refuse a directory that the user there cannot write to."""
        self._ask("check_directory", str(directory))

    def free_bytes(self, directory: Path) -> int:
        """Ask the file system there."""
        return self._number("free_bytes", str(directory))

    def make_private(self, namespace: Namespace, vm: VmName, directory: Path) -> Path:
        """Make the directory there."""
        return Path(self._text("make_private", namespace.tag, vm, str(directory)))

    def left_directories(self, namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
        """Name what was left there."""
        return self._texts("left_directories", namespace.tag, vm, str(directory))

    def sweep(self, namespace: Namespace, vm: VmName, directory: Path) -> list[str]:
        """Remove what was left there."""
        return self._texts("sweep", namespace.tag, vm, str(directory))

    def make_scratch(self, directory: Path, path: Path | None, size: int, reserve_bytes: int) -> Made:
        """Make the file there."""
        made = self._ask("make_scratch", str(directory), str(path) if path else "", size, reserve_bytes)
        with self._understood():
            return Made(reply.number(made[0], 1 << 30), reply.flag(made[1]))

    def used_bytes(self, descriptor: int) -> int:
        """Measure the file there."""
        return self._number("used_bytes", descriptor)

    def empty(self, descriptor: int) -> None:
        """Truncate the file there."""
        self._ask("empty", descriptor)

    def close(self, descriptor: int) -> None:
        """Close the file there."""
        self._ask("close", descriptor)

    def header(self, path: str) -> bytes:
        """Read the first bytes of an image there; none if it cannot be read."""
        with self._understood():
            return bytes.fromhex(self._text("header", path))

    def check_run_directory(self, directory: Path, prefix: str, qemu_user: QemuUser | None) -> None:
        """Look at the directories there."""
        self._ask("check_run_directory", str(directory), prefix, qemu_user)

    def make_run_directory(
        self, namespace: Namespace, vm: VmName, directory: Path, qemu_user: QemuUser | None
    ) -> Path:
        """Make the directory there."""
        return Path(self._text("make_run_directory", namespace.tag, vm, str(directory), qemu_user))

    def give(self, descriptor: int, qemu_user: QemuUser | None) -> None:
        """Change the owner of a file there."""
        self._ask("give", descriptor, qemu_user)

    def read_plain(self, path: Path, most_bytes: int) -> bytes:
        """Open the file there once, and fetch it in parts."""
        with self._understood():
            descriptor, size, why = self._ask("open_plain", str(path), most_bytes)
            if why:
                raise Unusable(f"on {self._channel.host}: {reply.text(why, _MOST_PATH)}")
            reply.number(descriptor, 1 << 30)
            size = reply.number(size, most_bytes)
        try:
            return self._fetched(path, descriptor, size)
        finally:
            self.close(descriptor)

    def command_line(self, process: int) -> tuple[str, ...] | None:
        """Ask the host for a process's arguments."""
        with self._understood():
            found = self._ask("command_line", process)
            if found is None:
                return None
            if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
                raise TypeError("not a command line")
            return tuple(found)

    def _fetched(self, path: Path, descriptor: int, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            with self._understood():
                length = min(_PART_BYTES, size - len(found))
                part = base64.b64decode(self._ask("read_at", descriptor, len(found), length), validate=True)
            if not part or len(part) > length:
                raise Unusable(f"cannot read {path} on {self._channel.host}: its size changed meanwhile")
            found += part
        return bytes(found)

    def filling(self, directory: Path, process: int | None) -> "RemoteFilling":
        """Return the file system of a directory there. process: QEMU's, None if not known."""
        return RemoteFilling(self, directory, process)

    def who(self, directory: Path, process: int | None) -> str:
        """Say which guests need the file system of a directory there."""
        with self._understood():
            return reply.text(
                self._channel.ask("filling", directory=str(directory), process=process), _MOST_PATH
            )

    def _ask(self, call: str, *arguments: object) -> Any:
        try:
            return self._channel.ask("files", call=call, arguments=list(arguments))
        except OSError as err:
            raise Failed(f"on {self._channel.host}: {err.strerror}") from err
        except MonitorError:  # which names the host
            raise
        except Failed as err:
            raise err.reworded(f"on {self._channel.host}: {err.message}") from err

    def _number(self, call: str, *arguments: object) -> int:
        with self._understood():
            return reply.number(self._ask(call, *arguments), _MOST_BYTES)

    def _text(self, call: str, *arguments: object) -> str:
        with self._understood():
            return reply.text(self._ask(call, *arguments), _MOST_PATH)

    def _texts(self, call: str, *arguments: object) -> list[str]:
        with self._understood():
            return [reply.text(one, _MOST_PATH) for one in self._ask(call, *arguments)]

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError) as err:
            raise MonitorError(f"what {self._channel.host} answers is invalid") from err


class RemoteFilling(Filling):
    """See `Filling`."""

    def __init__(self, files: RemoteFiles, directory: Path, process: int | None) -> None:
        super().__init__(directory, "", process)
        self._files = files
        self._looked = -_AGAIN_SECONDS

    def check(self, error: type[Failed] = Failed) -> None:
        """See `Filling.check`; once a second, since each look goes there and back."""
        if time.monotonic() - self._looked > _AGAIN_SECONDS:
            self._looked = time.monotonic()
            super().check(error)

    def free_bytes(self) -> int:
        """Ask the file system there."""
        return self._files.free_bytes(self.directory)

    def who(self) -> str:
        """Ask the host."""
        return self._files.who(self.directory, self._process)
