# SPDX-License-Identifier: GPL-2.0-or-later
"""Single files out of a point."""
