# SPDX-License-Identifier: GPL-2.0-or-later
"""The differences that are allowed, each with its reason. The README's table is checked against this list.

Nothing else may differ. An entry says between which subjects, in which scripts, and in which field; the
values on both sides are matched too, so that an entry can't hide a further difference in its field.
"""

import re
from dataclasses import dataclass

from tests.conformance.compare import ABSENT, Difference

VERSIONS = ("7.2", "10.0")
NEWEST = ("10.0", "11.1")


@dataclass(frozen=True)
class Allowed:
    """One allowed difference. scripts, where, left, right: regular expressions for the whole text."""

    name: str
    pair: tuple[str, str]
    reason: str
    scripts: str
    where: str
    left: str = ".*"
    right: str = ".*"

    def covers(self, script: str, pair: tuple[str, str], difference: Difference) -> bool:
        """Whether this entry allows a difference found in a script."""
        texts = (script, difference.where, str(difference.left), str(difference.right))
        patterns = (self.scripts, self.where, self.left, self.right)
        return pair == self.pair and all(
            matches(pattern, text) for pattern, text in zip(patterns, texts, strict=True)
        )


ALLOWED = [
    Allowed(
        "version",
        VERSIONS,
        "The version number itself.",
        "monitor:.*",
        r".*\.version\.qemu\.(major|minor|micro)|.*\.return\.qemu\.(major|minor|micro)",
        r"\d+",
        r"\d+",
    ),
    Allowed(
        "version-11",
        NEWEST,
        "The version number itself.",
        "monitor:.*",
        r".*\.version\.qemu\.(major|minor|micro)|.*\.return\.qemu\.(major|minor|micro)",
        r"\d+",
        r"\d+",
    ),
    Allowed(
        "node-children-and-limits",
        NEWEST,
        "Block nodes tell of their children, and images of the limits of requests.",
        "monitor:query_.*",
        r".*\.(children|limits)",
        ABSENT,
    ),
    Allowed(
        "read-only-bitmap-add",
        NEWEST,
        "A persistent bitmap cannot be added to a read-only node any more.",
        "bitmaps:bitmaps_of_a_read_only_disk|graph:what_a_snapshot_left_behind_is_read_only",
        r"replies\[\d+ (block-dirty-bitmap-add|bitmaps of .*)\].*",
    ),
    Allowed(
        "read-only-bitmap-remove-text",
        NEWEST,
        "Removing a persistent bitmap of a read-only node is refused by both, with another text.",
        "graph:what_a_snapshot_left_behind_is_read_only|restarts:an_external_snapshot_.*",
        r".*block-dirty-bitmap-remove\]\.error\.desc",
        "Bitmap '.*' is readonly and cannot be modified",
        "Cannot remove persistent bitmap .*: no write access to node .*",
    ),
    Allowed(
        "group-in-use-text",
        NEWEST,
        "Deleting a throttle group that is in use is refused by both, with another text.",
        "limits:a_job_into_a_scratch_behind_a_limit",
        r".*object-del\]\.error\.desc",
        "object 'lim0' is in use, can not be deleted",
        "Cannot delete throttle group 'lim0' with active references",
    ),
    Allowed(
        "json-error-places",
        NEWEST,
        "What is no JSON is refused with the line and column of the error, and in other words.",
        "monitor:malformed_input",
        r".*\.error\.desc",
        "JSON parse error, .*",
        r"\d+:\d+: JSON parse error, .*",
    ),
    Allowed(
        "json-error-places-simulated",
        ("simulator-11.1", "11.1"),
        "The simulator does not count lines and columns.",
        "monitor:malformed_input",
        r".*\.error\.desc",
        "JSON parse error, .*",
        r"\d+:\d+: JSON parse error, .*",
    ),
    Allowed(
        "node-active",
        VERSIONS,
        "Block nodes tell whether they are active since 10.0.",
        "monitor:query_.*",
        r".*\.active",
        ABSENT,
        "True",
    ),
    Allowed(
        "singlestep",
        VERSIONS,
        "query-status lost `singlestep` in 9.0.",
        "machine:stop_and_cont",
        r".*\.singlestep",
        "False",
        ABSENT,
    ),
    Allowed(
        "fdset-error-texts",
        VERSIONS,
        "The texts for a missing descriptor set, or descriptor of the right mode, were made anew.",
        "descriptors:a_(descriptor_set_that_is_not_there|read_only_descriptor.*)",
        r".*\.error\.desc",
        "Could not dup FD for /dev/fdset/.*",
        "Failed to find .*",
    ),
    Allowed(
        "fdset-of-stopped",
        VERSIONS,
        "While the processors stand still a removed descriptor set stays on 7.2, and later on too.",
        "descriptors:a_stopped_machine_may_keep_a_removed_set",
        r"replies\[[247] query-fdsets\]\.return",
        r"\[\{'fds': \[\{'fd': '<fd>'\}\], 'fdset-id': 7\}\]",
        r"\[\]",
    ),
    Allowed(
        "transaction-property-text",
        VERSIONS,
        "A capital letter in the text went away.",
        "transactions:grouped_completion",
        r".*\.error\.desc",
        ".* Transaction property .*",
        ".* transaction property .*",
    ),
    Allowed(
        "resize-under-job-text",
        VERSIONS,
        "Resizing a disk under a job is refused by both, with another text.",
        "graph:resize_errors",
        r".*\.error\.desc",
        r"Device '\(null\)' is in use",
        "Node 'drive-vda' is busy: .*",
    ),
    Allowed(
        "copied-holes",
        VERSIONS,
        "copy-before-write of a hole leaves data full of zeroes in the scratch on 7.2, a hole on 10.0: the "
        "extents of snapshot-access differ, its bytes do not.",
        "views:.*",
        r".*look at moment\]\.extents\.base:allocation.*",
    ),
]


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern covers a whole text."""
    return re.fullmatch(pattern, text, re.DOTALL) is not None


def allowed(script: str, pair: tuple[str, str], difference: Difference) -> bool:
    """Whether a difference is on the list."""
    return any(each.covers(script, pair, difference) for each in ALLOWED)


def table() -> str:
    """Return the list as the README's table."""
    lines = ["| name | between | reason |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {' and '.join(each.pair)} | {each.reason} |" for each in ALLOWED]
    return "\n".join(lines) + "\n"
