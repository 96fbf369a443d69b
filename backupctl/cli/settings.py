# SPDX-License-Identifier: GPL-2.0-or-later
"""What may stand in the configuration file: the keys and their types."""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from backupctl.options import FreezeMode, OnBrokenChain, ViewKind, WhenOff
from backupctl.sizes import MAX_CHAIN
from backupctl.vm.trial.options import Accelerator, DiskBus

MAX_SECONDS = 3600
MAX_BOOT_SECONDS = 24 * 3600
MAX_COUNT = 1000
MAX_WAIT_SECONDS = 7 * 24 * 3600
MAX_JOBS = 100

Text = Annotated[str, Meta(description="a quoted string")]
Rate = Annotated[str, Meta(description='a quoted string such as "200M"')]
Flag = Annotated[bool, Meta(description="true or false")]
Command = Annotated[
    tuple[str, ...], Meta(description="a list of quoted strings: a program's path, and its arguments")
]
Paths = Annotated[tuple[str, ...], Meta(description="a list of quoted strings, each an absolute path")]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT, description=f"a whole number, 0 to {MAX_COUNT}")]
Layers = Annotated[int, Meta(ge=0, le=MAX_CHAIN, description=f"a whole number, 0 to {MAX_CHAIN}")]
Seconds = Annotated[
    float, Meta(gt=0, le=MAX_SECONDS, description=f"a number of seconds, above 0, at most {MAX_SECONDS}")
]

Wait = Annotated[
    float, Meta(ge=0, le=MAX_WAIT_SECONDS, description=f"a number of seconds, 0 to {MAX_WAIT_SECONDS}")
]
Jobs = Annotated[int, Meta(ge=1, le=MAX_JOBS, description=f"a whole number, 1 to {MAX_JOBS}")]
Boot = Annotated[
    float, Meta(ge=1, le=MAX_BOOT_SECONDS, description=f"a number of seconds, 1 to {MAX_BOOT_SECONDS}")
]
Percent = Annotated[float, Meta(ge=0, le=100, description="a number, 0 to 100")]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The keys of [defaults], and of [vm.NAME], which wins. None: not set. Texts stay as they are written."""

    repository: Text | None = None
    scratch: Text | None = None
    scratch_size: Rate | None = None
    when_off: WhenOff | None = None
    freeze: FreezeMode | None = None
    freeze_budget: Seconds | None = None
    limit: Rate | None = None
    view: ViewKind | None = None
    on_broken_chain: OnBrokenChain | None = None
    max_chain: Layers | None = None
    keep_checkpoints: Count | None = None
    include_files: Paths | None = None
    no_firmware: Flag | None = None
    command_timeout: Seconds | None = None
    agent_timeout: Seconds | None = None
    stall_timeout: Seconds | None = None
    keep_last: Count | None = None
    keep_hourly: Count | None = None
    keep_daily: Count | None = None
    keep_weekly: Count | None = None
    keep_monthly: Count | None = None
    keep_yearly: Count | None = None
    keep_within: Text | None = None
    max_age: Text | None = None
    warn_age: Text | None = None
    full_every: Text | None = None
    verify_percent: Percent | None = None
    restore_test: Text | None = None
    restore_test_until: Literal["agent", "login"] | None = None
    restore_test_command: Text | None = None
    restore_test_timeout: Boot | None = None
    restore_test_machine: Text | None = None
    restore_test_memory: Rate | None = None
    restore_test_disk_bus: DiskBus | None = None
    restore_test_accelerator: Accelerator | None = None
    restore_test_firmware: Text | None = None
    restore_test_kernel: Text | None = None
    restore_test_initrd: Text | None = None
    restore_test_append: Text | None = None


class HookSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The keys of [hooks], and of [vm.NAME.hooks], which wins one by one."""

    before: Command | None = None
    after: Command | None = None
    failed: Command | None = None
    timeout: Seconds | None = None


class NotifySettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The keys of [notify], and of [vm.NAME.notify], which wins one by one."""

    mail: Text | None = None
    sendmail: Text | None = None
    webhook: Text | None = None
    ntfy: Text | None = None
    healthchecks: Text | None = None
    success: Flag | None = None
    repeat: Text | None = None
    timeout: Seconds | None = None


class MetricsSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The keys of [metrics]. state: where results are remembered, for notices and `check` as well."""

    textfile: Text | None = None
    state: Text | None = None


class VmSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The keys and tables of [vm.NAME]. disks: QEMU's name of a disk to the name it is stored under.

    Either qmp (and agent), or libvirt (and domain). image: the name that a disk is stored under to its
    files, as `image_texts` reads them.
    """

    qmp: Text | None = None
    agent: Text | None = None
    plain_tcp: Flag | None = None
    libvirt: Text | None = None
    domain: Text | None = None
    disks: dict[str, str] = {}
    image: dict[str, str] = {}
    hooks: HookSettings = HookSettings()
    notify: NotifySettings = NotifySettings()


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The keys of [run]: how `run` goes about it. None: not set."""

    jobs: Jobs | None = None
    jobs_per_storage: Jobs | None = None
    jobs_per_host: Jobs | None = None
    random_delay: Wait | None = None
    wait_lock: Wait | None = None
    max_time: Wait | None = None


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole file."""

    defaults: Settings = Settings()
    run: RunSettings = RunSettings()
    vm: dict[str, VmSettings] = {}
    hooks: HookSettings = HookSettings()
    notify: NotifySettings = NotifySettings()
    metrics: MetricsSettings = MetricsSettings()


TABLES: Mapping[str, type[msgspec.Struct]] = {"hooks": HookSettings, "notify": NotifySettings}
"""The tables that a file has for all VMs, and [vm.NAME] for itself."""
SECRETS = ("webhook", "ntfy", "healthchecks")
"""Keys whose values are never shown."""


def settable() -> tuple[str, ...]:
    """Return the keys of [vm.NAME], in order; not those of its tables for hooks and notices."""
    return tuple(name for name in VmSettings.__struct_fields__ if name not in TABLES)


def settable_for_run() -> tuple[str, ...]:
    """Return the keys of [run], in order."""
    return RunSettings.__struct_fields__
