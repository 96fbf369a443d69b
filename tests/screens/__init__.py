# SPDX-License-Identifier: GPL-2.0-or-later
"""Every screen as it is seen, at several widths, on a terminal and in a pipe, kept in `golden/`."""
