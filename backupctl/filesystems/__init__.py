# SPDX-License-Identifier: GPL-2.0-or-later
"""The file systems of guests, read by us alone: the kernel of the host never sees them."""
