# SPDX-License-Identifier: GPL-2.0-or-later
"""What users install: the wheel, the source distribution and the Debian package, built and used."""
