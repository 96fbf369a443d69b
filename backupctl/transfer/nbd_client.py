# SPDX-License-Identifier: GPL-2.0-or-later
"""One NBD client connection that never waits without a time limit (libnbd's own calls wait for ever).

Commands are sent with libnbd's ``aio_*`` calls and identified by their cookies. An error reply is raised when
the command is retired; the data of that command must not be used then: the buffer has whatever it held before
(in CVE-2022-0485 a client took that for data).
"""

import errno
import logging
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import nbd

from backupctl.errors import TransferError
from backupctl.transfer.polling import poll_once

_log = logging.getLogger("backupctl.transfer")

BASE_ALLOCATION = "base:allocation"
_HANDSHAKE_BYTES = 64 << 20  # of memory; an honest handshake needs almost none
_MOST_EXTENTS = 1 << 20  # of a context in one reply; QEMU's NBD_MAX_BLOCK_STATUS_EXTENTS is 131,072
_CHECK_SECONDS = 0.1
_DISCONNECT_SECONDS = 2.0  # a server that hangs must not delay the roll back

Entries = dict[str, list[int]]
"""Block status by meta context: length, flags, length, flags, ..."""


class Connection:
    """A connection to one export.

    failure: the error to raise, ReadFailed or WriteFailed. stall_seconds: the longest wait for any
    sign of life. check: called at least every 100 ms of such a wait; what it raises ends it. A thread that
    takes the connection over sets its own.
    """

    def __init__(
        self,
        export: str,
        failure: type[TransferError],
        stall_seconds: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.handle: Any = nbd.NBD()
        self.handle.set_export_name(export)
        self.handle.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd.HANDSHAKE_FLAG_NO_ZEROES)
        # By its strict checks libnbd allows CMD_FLAG_DF with pread_structured only, and not in `start_read`.
        self.handle.set_strict_mode(self.handle.get_strict_mode() & ~nbd.STRICT_FLAGS)
        # By default libnbd clears each buffer before it reads into it: a tenth of the CPU of a full backup. A
        # read that failed is never used, and one that was only half answered fails (measured:
        # test_data_that_can_not_be_is_a_read_error_and_never_zeroes).
        self.handle.set_pread_initialize(False)
        self.failure = failure
        self._export = export
        self._stall_seconds = stall_seconds
        self.check = check
        self._checked = 0.0
        self._read_flags = 0

    def connect(self, address: socket.socket | Path, contexts: Sequence[str] = ()) -> None:
        """Shake hands on a connected socket (a duplicate of it) or a unix socket's path.

        contexts: the meta contexts that the server must offer. Raises `failure`.
        """
        where = address if isinstance(address, Path) else "a connected socket"
        _log.debug("NBD %s: connect to %s, contexts %s", self._export, where, list(contexts))
        try:
            for context in contexts:
                self.handle.add_meta_context(context)
            if isinstance(address, Path):
                self.handle.aio_connect_unix(str(address))
            else:
                self.handle.aio_connect_socket(os.dup(address.fileno()))
            memory = _memory_bytes()
            self.wait(lambda: self._handshake_has_ended(memory))
            if not self.handle.aio_is_ready():
                raise self.failure(f"the NBD server refused the export {self._export}")
            self._read_flags = nbd.CMD_FLAG_DF if self.handle.can_df() else 0
            for context in contexts:
                if not self.handle.can_meta_context(context):
                    raise self.failure(f"the NBD server does not offer the meta context {context}")
            _log.debug("NBD %s: ready, %d bytes, %s", self._export, self.size(), self.handle.get_protocol())
        except (nbd.Error, OSError) as err:
            raise self.explained(err) from err

    def size(self) -> int:
        """Return the export's size in bytes."""
        return int(self.handle.get_size())

    def block_status(self, offset: int, length: int) -> Entries:
        """Ask for the state of a range of less than 4 GiB, in every agreed context. Raises `failure`."""
        found: Entries = {}
        longest = 0

        def extents(context: str, _offset: int, entries: list[int], _error: object) -> int:
            nonlocal longest
            longest = max(longest, len(entries) // 2)
            # libnbd takes replies of eight million extents. Those of several contexts, and the arrays made of
            # them, would be a gigabyte of the memory of a machine that runs guests.
            found[context] = entries[: 2 * _MOST_EXTENTS]
            return 0

        try:
            cookie = self.handle.aio_block_status(length, offset, extents)
            self.wait(lambda: self.completed(cookie))
        except nbd.Error as err:
            raise self.explained(err) from err
        if longest > _MOST_EXTENTS:
            raise self.failure(f"the NBD server sent {longest:,} extents in one reply")
        return found

    def start_read(self, buffer: "nbd.Buffer", offset: int) -> int:
        """Start to read as many bytes as `buffer` holds; returns the command's cookie. Raises `failure`.

        NBD_CMD_FLAG_DF asks for one unfragmented reply. Without it QEMU's server replies in fragments, and
        closes the connection when one of them fails, instead of replying with the error (measured:
        test_a_cluster_that_cannot_be_read_is_zeroes_if_damage_is_allowed_and_no_other).
        """
        try:
            return int(self.handle.aio_pread(buffer, offset, flags=self._read_flags))
        except nbd.Error as err:
            raise self.explained(err) from err

    def start_write(self, buffer: "nbd.Buffer", offset: int) -> int:
        """Start to write all of `buffer`; returns the command's cookie. Raises `failure`."""
        try:
            return int(self.handle.aio_pwrite(buffer, offset))
        except nbd.Error as err:
            raise self.explained(err) from err

    def start_zero(self, length: int, offset: int) -> int:
        """Start to write zeroes; returns the command's cookie. Raises `failure`."""
        try:
            return int(self.handle.aio_zero(length, offset))
        except nbd.Error as err:
            raise self.explained(err) from err

    def flush(self, seconds: float) -> None:
        """Have the server flush all completed writes to stable storage in `seconds`. Raises `failure`."""
        try:
            cookie = self.handle.aio_flush()
            self._await(lambda: self.completed(cookie), seconds, self.check)
        except nbd.Error as err:
            raise self.explained(err) from err

    def retire(self) -> tuple[int, TransferError | None] | None:
        """Retire a command that has ended: return its cookie, and its error. None if there is none.

        It looks at none that is still in flight, and may be asked only while there are any. Raises `failure`
        if the connection is lost.
        """
        cookie = self.handle.aio_peek_command_completed()
        if not cookie:
            if not self.alive():
                raise self.failure("the NBD connection was lost")
            return None
        try:
            self.completed(cookie)
        except TransferError as err:
            # A lost server says nothing about what was asked: only an error reply of a live one counts.
            if not self.alive():
                raise
            return cookie, err
        return cookie, None

    def completed(self, cookie: int) -> bool:
        """Whether a command has ended; it is then retired. Raises `failure` if it failed."""
        try:
            return bool(self.handle.aio_command_completed(cookie))
        except nbd.Error as err:
            raise self.explained(err) from err

    def finish(self, cookies: Iterable[int]) -> None:
        """Wait until these commands have ended. Raises `failure` if one failed."""
        for cookie in cookies:
            self.wait(partial(self.completed, cookie))

    def wait(self, done: Callable[[], bool]) -> None:
        """Serve this connection until `done()`. Raises `failure` at a stall and if the connection is lost."""
        self._await(done, self._stall_seconds, self.check)

    def _await(
        self, done: Callable[[], bool], seconds: float, check: Callable[[], None] = lambda: None
    ) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            now = time.monotonic()
            if now - self._checked >= _CHECK_SECONDS:
                self._checked = now
                check()
            if now > deadline:
                raise self.failure(f"the NBD server was silent for {seconds:g} s")
            if not self.alive():
                raise self.failure("the NBD connection was lost")
            poll_once([self], _CHECK_SECONDS)

    def _handshake_has_ended(self, memory_before: int) -> bool:
        # libnbd stores every context that a server lists, without a limit: a hostile server could fill our
        # memory with them.
        if _memory_bytes() - memory_before > _HANDSHAKE_BYTES:
            raise self.failure("the NBD server's handshake does not end")
        return not self.handle.aio_is_connecting()

    def events(self) -> int:
        """Return the poll(2) events that the connection waits for now."""
        direction = self.handle.aio_get_direction()
        events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
        return events | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)

    def fileno(self) -> int:
        """Return the socket."""
        return int(self.handle.aio_get_fd())

    def on_events(self, events: int) -> None:
        """Send and receive what is possible without blocking. Raises `failure`."""
        try:
            # A hang-up is noticed by reading, so that what arrived before it is not lost.
            if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and (
                self.handle.aio_get_direction() & nbd.AIO_DIRECTION_READ
            ):
                self.handle.aio_notify_read()
            elif events & select.POLLOUT:
                self.handle.aio_notify_write()
            elif events:
                self.handle.aio_notify_read()
        except nbd.Error as err:
            raise self.explained(err) from err

    def alive(self) -> bool:
        """Whether the connection can still carry commands."""
        return not (self.handle.aio_is_dead() or self.handle.aio_is_closed())

    def close(self) -> None:
        """Close the connection. Never raises.

        libnbd closes the socket when its handle is dropped. A server that still serves is told first;
        otherwise it would log an error.
        """
        if self.handle is not None:
            _log.debug("NBD %s: close", self._export)
            with suppress(nbd.Error, TransferError):
                if self.handle.aio_is_ready():
                    self.handle.aio_disconnect()
                    self._await(lambda: not self.alive(), _DISCONNECT_SECONDS)
            self.handle = None

    def explained(self, err: nbd.Error | OSError) -> TransferError:
        """Return `failure` with libnbd's reason."""
        _log.debug("NBD %s: %s", self._export, err)
        if isinstance(err, OSError):
            return self.failure(f"the NBD connection failed: {err.strerror}")
        number = int(err.errnum or 0)
        if not self.alive() or number in (errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.EPIPE):
            return self.failure("the NBD connection was lost")
        return self.failure(f"the NBD server answered: {os.strerror(number) if number else err.string}")


def _memory_bytes() -> int:
    """Return the resident memory of this process. Not its peak, which starts at that of its parent."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
