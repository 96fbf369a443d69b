# SPDX-License-Identifier: GPL-2.0-or-later
"""One suite of monitor and NBD scripts for every QEMU, real or simulated.

A script is written once and played on each subject; what came back becomes a normalised transcript;
transcripts of two subjects are compared field by field, but for the differences named in `differences`.
"""
