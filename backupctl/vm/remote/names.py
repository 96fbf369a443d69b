# SPDX-License-Identifier: GPL-2.0-or-later
"""What both ends of a remote session know."""

READY = b"backupctl remote program 1\n"
"""The line before the first answer; what comes before it is a login script's."""
MONITOR, NBD = "m", "n"
"""The names of the sockets that ssh forwards; short, since a socket's path has 107 bytes at most."""
ALIVE_SECONDS = 5.0
"""How often the run writes an empty line."""
GUARD_SECONDS = 60.0
"""How long the guard of a run whose line was cut may need, once it knows."""
SILENCE_SECONDS = 30.0
"""Without a line for so long the run is taken for dead: not every sshd notices that a line is cut."""
