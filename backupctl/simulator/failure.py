# SPDX-License-Identifier: GPL-2.0-or-later
"""The error with which a monitor command is refused."""


class CommandError(Exception):
    """A command is refused and had no effect. kind: QMP's error class. The text is QEMU's own."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind
