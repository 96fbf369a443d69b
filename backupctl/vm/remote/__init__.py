# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs on other hosts, reached by ssh."""
