# SPDX-License-Identifier: GPL-2.0-or-later
"""The NBD server: fixed newstyle, structured replies, meta contexts (doc/proto.md of the NBD project)."""
