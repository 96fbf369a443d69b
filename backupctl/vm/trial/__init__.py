# SPDX-License-Identifier: GPL-2.0-or-later
"""A throw-away VM that shows whether the disks of a point boot."""
