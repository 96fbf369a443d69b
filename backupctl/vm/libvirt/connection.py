# SPDX-License-Identifier: GPL-2.0-or-later
"""A connection to libvirt whose calls all end in time. The guard imports this: only what loads quickly.

libvirt's own calls wait for ever (measured with libvirt 9.0: virDomainBackupBegin waited 68 s for a QEMU that
hung, and then succeeded). So each runs in a thread of its own connection. A call that is late is not waited
for any longer, its outcome is unknown, and the connection is given up: whoever needs to know connects anew
and asks.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, ClassVar, Generic, Self, TypeVar

from backupctl.errors import CommandFailed, MonitorUnreachable, OutcomeUnknown
from backupctl.vm.guest.agent import no_log

Result = TypeVar("Result")

NO_DOMAIN = "42"
NO_JOB = "55"
HELD = "68"
NOT_RUNNING = "84"
NO_BACKUP_JOB = "104"
_CONNECTION_CODES = ("6", "7", "38", "39")
"""virErrorNumber: an invalid connection, no connection, a system error, an RPC error."""
_PAUSE_SECONDS = 0.02
_CLOSE_SECONDS = 1.0
_RUNNING_STATES = (1, 2, 3, 7)
"""virDomainState: running, blocked, paused, suspended by the guest's power management."""
PAUSED, PAUSED_BY_IO_ERROR = 3, 5
"""virDomainState, and virDomainPausedReason."""
INSTALL = "apt install python3-libvirt"


def refusal(call: str, number: str, description: str) -> CommandFailed:
    """Return libvirt's refusal of a call as an error. number: of virErrorNumber; it is the error's class."""
    made = CommandFailed(call, number, description).reworded(f"libvirt refused {call}: {description}")
    if number == HELD:
        made.hint = "another operation of libvirt holds the VM; call again when it has ended"
    return made


class Pending(Generic[Result]):
    """A call under way."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._done = threading.Event()
        self._result: Result | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the call; for the worker."""
        try:
            self._result = self._function()
        except BaseException as err:  # noqa: BLE001 - raised again where the call was made
            self.error = err
        self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it came."""
        return self._done.wait(seconds)

    def result(self) -> Any:
        """Return the result of a call that has ended well."""
        return self._result


def _header(path: str) -> bytes:
    from backupctl.vm.libvirt import run_directory  # noqa: PLC0415 - the guard needs none

    return run_directory.header(path)


def library() -> Any:
    """Return libvirt's Python module, which is loaded only where it is used. Raises MonitorUnreachable."""
    try:
        import libvirt  # noqa: PLC0415 - a package of its own that not everybody has
        import libvirt_qemu  # noqa: F401, PLC0415 - as above
    except ImportError as err:
        raise MonitorUnreachable("the Python module of libvirt is not installed", hint=INSTALL) from err
    # By default the library prints each error on stderr.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return libvirt


class Connection:
    """A connection to one domain; `open` makes one.

    domain: libvirt's handle, to be used in functions that `call` is given, and nowhere else. header: returns
    the first bytes of an image of libvirt's machine, see `run_directory.header`.
    """

    log: ClassVar[Callable[..., None]] = staticmethod(no_log)
    """Gets a debug line for each call and its end, as `Agent.log` does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.alive = True
        self.domain: Any = None
        self.header: Callable[[str], bytes] = _header
        self._handle: Any = None
        self._calls: queue.SimpleQueue[Pending[Any] | None] = queue.SimpleQueue()
        # A daemon: a call that never ends must not keep the process.
        threading.Thread(target=self._work, daemon=True, name="libvirt").start()

    @classmethod
    def open(cls, uri: str, domain: str, seconds: float, dial: Callable[[], object] | None = None) -> Self:
        """Connect to libvirt, and find the domain. dial: see `to_host`. Raises MonitorUnreachable."""
        made = cls.to_host(uri, seconds, dial)
        try:
            made.domain = made.call("virDomainLookupByName", lambda: made.handle.lookupByName(domain))
        except CommandFailed as err:
            made.close()
            if err.error_class != NO_DOMAIN:
                raise MonitorUnreachable(f"cannot find the domain {domain!r:.100}: {err.message}") from err
            raise MonitorUnreachable(
                f"libvirt at {uri} has no domain named {domain!r:.100}",
                hint="`backupctl discover` lists the domains; set domain = in the configuration, or --domain",
            ) from err
        except OutcomeUnknown as err:
            raise MonitorUnreachable(f"libvirt at {uri} does not answer: {err.message}") from err
        return made

    @classmethod
    def to_host(cls, uri: str, seconds: float, dial: Callable[[], object] | None = None) -> Self:
        """Connect to libvirt, for all its domains. Raises MonitorUnreachable.

        dial: has libvirt reached from the socket of the URI, once a client has connected to that; it may
        raise MonitorError.
        """
        libvirt = library()
        made = cls(seconds)
        try:
            made._handle = made.call(
                "virConnectOpen", lambda: libvirt.open(uri), meanwhile=dial and cache(dial)
            )
        except MonitorUnreachable:
            made.give_up()
            raise
        except (CommandFailed, OutcomeUnknown) as err:
            made.close()
            raise MonitorUnreachable(
                f"no libvirt answers at {uri}: {err.message}", hint="is libvirtd (or virtqemud) running?"
            ) from err
        return made

    @property
    def handle(self) -> Any:
        """Libvirt's connection, to be used as `domain` is."""
        return self._handle

    def start(self, function: Callable[[], Result]) -> Pending[Result]:
        """Start a call, without waiting for it; calls are made one after the other."""
        pending = Pending(function)
        self._calls.put(pending)
        return pending

    def call(
        self,
        name: str,
        function: Callable[[], Result],
        seconds: float | None = None,
        meanwhile: Callable[[], object] | None = None,
    ) -> Result:
        """Make a call, and return its result.

        name: of libvirt's function, for messages. seconds: the longest that it may take. meanwhile: called
        again and again while it is waited for. Raises CommandFailed, OutcomeUnknown.
        """
        if not self.alive:
            raise OutcomeUnknown(name, "the connection to libvirt is broken")
        begun = time.monotonic()
        deadline = begun + (self.seconds if seconds is None else seconds)
        self.log("-> %s", name)
        pending = self.start(function)
        while not pending.wait(_PAUSE_SECONDS if meanwhile else max(deadline - time.monotonic(), 0.0)):
            if time.monotonic() >= deadline:
                self.give_up()
                self.log("%s: no answer within %.1f s", name, deadline - begun)
                raise OutcomeUnknown(name, "time-out")
            if meanwhile:
                meanwhile()
        return self.finished(name, pending)

    def finished(self, name: str, pending: Pending[Result]) -> Result:
        """Return the result of a call that has ended. Raises CommandFailed, OutcomeUnknown."""
        error = pending.error
        self.log("<- %s: %.200s", name, "done" if error is None else error)
        if error is None:
            result: Result = pending.result()
            return result
        if not hasattr(error, "get_error_code"):
            raise error
        number = str(error.get_error_code())
        text = str(error)
        # A connection that has broken does not know it: isAlive may still say 1.
        if number in _CONNECTION_CODES and self._handle is not None:
            self.give_up()
            raise OutcomeUnknown(name, text) from error
        raise refusal(name, number, text) from error

    def state(self) -> tuple[int, int]:
        """Return the domain's virDomainState, and the reason for it. Raises MonitorError."""
        state, reason = self.call("virDomainGetState", self.domain.state)
        return state, reason

    def is_running(self) -> bool:
        """Whether the domain has a QEMU. Raises MonitorError."""
        return self.state()[0] in _RUNNING_STATES

    def give_up(self) -> None:
        """Use this connection no more; a call that is late may still take effect."""
        self.alive = False
        self._calls.put(None)

    def close(self) -> None:
        """Disconnect. Never raises; waits for a second at most."""
        if self.alive:
            ended = self.start(self._disconnect)
            self.give_up()
            ended.wait(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _disconnect(self) -> None:
        self.domain = None
        if self._handle is not None:
            self._handle.close()

    def _work(self) -> None:
        while (pending := self._calls.get()) is not None:
            pending.run()


def domain_names(
    uri: str, seconds: float, dial: Callable[[], object] | None = None
) -> list[tuple[str, bool]]:
    """Return the names of all domains of a libvirt, and whether each runs. Raises MonitorError.

    dial: see `Connection.to_host`.
    """
    with Connection.to_host(uri, seconds, dial) as connection:
        found = connection.call("virConnectListAllDomains", connection.handle.listAllDomains)
        return sorted(
            connection.call("virDomainGetName", lambda: [(one.name(), bool(one.isActive())) for one in found])
        )


def module_directory() -> str:
    """Return where libvirt's Python module lies, for a process that looks nowhere else."""
    library()
    with suppress(AttributeError, TypeError):
        return str(sys.modules["libvirt"].__file__).rpartition("/")[0]
    return ""
