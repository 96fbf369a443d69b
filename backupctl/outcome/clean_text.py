# SPDX-License-Identifier: GPL-2.0-or-later
"""Texts from outside (QEMU, manifests, the agent, file names), made safe to be shown."""


def clean(text: object) -> str:
    """Return a text without control characters; nor may it begin a line of its own, as if we said it."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(
        character if character.isprintable() else f"\\x{ord(character):02x}" for character in found
    )
