# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of libvirt, by its own backup API: pull mode and checkpoints (virDomainBackupBegin)."""
