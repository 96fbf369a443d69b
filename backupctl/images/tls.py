# SPDX-License-Identifier: GPL-2.0-or-later
"""TLS for QEMU's NBD server: the credentials of a directory, checked, and copied to where QEMU reads them.

::

    DIR/keys.psk                                             pre-shared keys (tls-creds-psk)
    DIR/ca-cert.pem, server-cert.pem, server-key.pem         certificates (tls-creds-x509); each client must
                                                             have one that the same CA has signed

Source: QEMU's docs/system/tls.rst.
"""

from pathlib import Path
from typing import Any

from backupctl.errors import UNTOUCHED, UsageError
from backupctl.system import trusted

OBJECT = "tls"
_PSK = ("keys.psk",)
_X509 = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
_MOST_BYTES = 1 << 20


def read(directory: Path) -> dict[str, bytes]:
    """Read the credentials of a directory, by the names of their files.

    The keys say who may read the disks, so nobody else may be able to write to them. Raises UsageError.
    """
    names = _PSK if (directory / _PSK[0]).exists() else _X509
    found = {}
    for name in names:
        path = directory / name
        try:
            found[name] = trusted.read(path, _MOST_BYTES)
        except OSError as err:
            raise UsageError(
                f"cannot read the TLS credentials {path}: {err.strerror}",
                state=UNTOUCHED,
                hint=f"{directory} must have {_PSK[0]}, or {', '.join(_X509)}",
            ) from err
    return found


def options(credentials: dict[str, bytes], private: Path) -> dict[str, Any]:
    """Write credentials into a new private directory; return QEMU's options of the object for them."""
    private.mkdir(0o700)
    for name, content in credentials.items():
        path = private / name
        path.touch(0o600, exist_ok=False)
        path.write_bytes(content)
    kind = "psk" if _PSK[0] in credentials else "x509"
    made = {"qom-type": f"tls-creds-{kind}", "id": OBJECT, "endpoint": "server", "dir": str(private)}
    return made if kind == "psk" else {**made, "verify-peer": True}
