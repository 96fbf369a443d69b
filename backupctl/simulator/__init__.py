# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated QEMU virtual machine, reached through its sockets only.

The modules, from the bottom up::

    bitmap    hierarchical bitmaps                 store     sparse content and what of it is allocated
    nodes     what one block node does             filters   copy-before-write and snapshot-access
    graph     names, links, permissions            opening   `blockdev-add`
    dirty     dirty bitmaps of a node              jobs, transaction, descriptors, describe
    nbd/      the NBD server                       commands/ what each monitor command does
    guest, agent                                   faults    what goes wrong, and when
    machine   all of it together                   monitor, control   its sockets

One process, one event loop: every block operation is short and runs to its end before the next one
begins, which is the serialisation that copy-before-write needs.
"""
