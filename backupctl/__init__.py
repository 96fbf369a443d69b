# SPDX-License-Identifier: GPL-2.0-or-later
"""Incremental backups of running QEMU virtual machines, over QEMU's own monitor."""

__version__ = "0.1.0"
