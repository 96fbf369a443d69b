# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt tells of a domain, and the files in which the domain keeps its state beside the disks.

libvirt's backup jobs hold disks only. The variables of UEFI are a plain file (`os/nvram`), and the state of a
TPM emulator is in a directory of swtpm. Both are read while the guest runs.
"""

import re
from pathlib import Path
from xml.etree.ElementTree import Element

from backupctl.errors import CommandFailed
from backupctl.names import safe_file_name
from backupctl.system import bounded_read
from backupctl.vm.definition import Definition, DefinitionFile, state_file
from backupctl.vm.libvirt import xml
from backupctl.vm.libvirt.connection import Connection
from backupctl.vm.qmp.files import LOCAL, Files

_INACTIVE = 2
"""VIR_DOMAIN_XML_INACTIVE: what the domain is defined as. Without VIR_DOMAIN_XML_SECURE: no passwords."""
_SWTPM = Path("/var/lib/libvirt/swtpm")
"""Where the system's libvirt has swtpm keep its state: UUID/tpm2 or UUID/tpm1.2 (its qemu_tpm.c)."""
_TPM_DIRECTORIES = {"1.2": "tpm1.2", "2.0": "tpm2"}
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_MOST_TPM_FILES = 16
_MOST_TPM_BYTES = 1 << 20
_NO_STATE = (".lock",)
_TPM_ELSEWHERE = Definition(omitted=("the state of the TPM: it is on another host",))


def definition(connection: Connection) -> Definition:
    """Return the XML of a domain as it is defined. Raises MonitorError if libvirt is lost."""
    try:
        text = connection.call("virDomainGetXMLDesc", lambda: connection.domain.XMLDesc(_INACTIVE))
    except CommandFailed as err:
        return Definition(omitted=(err.message,))
    if len(text) > xml.MAX_BYTES:
        return Definition(omitted=(f"the XML of the domain has {len(text)} characters",))
    return Definition((DefinitionFile("domain", "domain.xml", "", text.encode()),))


def state_files(connection: Connection, files: Files, *, firmware: bool) -> Definition:
    """Read a domain's UEFI variables (firmware), and the state of its TPM. Raises MonitorError, Failed.

    files: those of libvirt's machine. The state of a TPM is read on this machine only.
    """
    try:
        text = connection.call("virDomainGetXMLDesc", connection.domain.XMLDesc)
    except CommandFailed as err:
        return Definition(omitted=(err.message,))
    root = xml.parse(text)
    found = Definition()
    if firmware and (variables := variables_path(root)):
        found += state_file("variables", "variables.fd", Path(variables), files.read_plain)
    elif firmware and root.find("os/nvram") is not None:
        found += Definition(omitted=("the UEFI variables are not in a file of this host",))
    if (tpm := root.find("devices/tpm/backend[@type='emulator']")) is not None:
        found += _tpm_state(root, tpm) if files is LOCAL else _TPM_ELSEWHERE
    return found


def variables_path(root: Element) -> str:
    """Return the path of a domain's UEFI variables, "" if it has none that are a file."""
    nvram = root.find("os/nvram")
    if nvram is None or nvram.get("type", "file") != "file":
        return ""
    source = nvram.find("source")
    path = source.get("file", "") if source is not None else (nvram.text or "").strip()
    return path if path.startswith("/") else ""


def _tpm_state(root: Element, backend: Element) -> Definition:
    uuid, version = root.findtext("uuid", ""), backend.get("version", "2.0")
    source = backend.find("source")
    if source is not None:
        directory = Path(source.get("path", "") or "/")
        if source.get("type") == "file":
            return state_file("tpm", "tpm-state", directory, bounded_read.read, _MOST_TPM_BYTES)
    elif _UUID.fullmatch(uuid) and version in _TPM_DIRECTORIES:
        directory = _SWTPM / uuid / _TPM_DIRECTORIES[version]
    else:
        return Definition(omitted=(f"the state of the TPM: unknown version {version!r:.20}",))
    return _files_in(directory)


def _files_in(directory: Path) -> Definition:
    try:
        names = bounded_read.names(directory, _MOST_TPM_FILES)
    except bounded_read.Unusable as err:
        return Definition(omitted=(f"the state of the TPM: {err}",))
    found = Definition()
    for name in names:
        if not name.endswith(_NO_STATE):
            path, stored = directory / name, f"tpm-{safe_file_name(name)}"
            found += state_file("tpm", stored, path, bounded_read.read, _MOST_TPM_BYTES)
    return found
