# SPDX-License-Identifier: GPL-2.0-or-later
"""A reader of Prometheus's text format that takes nothing else, and the rules of `promtool check metrics`."""

import re
from dataclasses import dataclass

_HELP = re.compile(r"# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)")
_TYPE = re.compile(r"# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (counter|gauge|histogram|summary|untyped)")
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{(.*)\} (-?[0-9.e+-]+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')
_NOT_BASE_UNITS = re.compile(
    r"(^|_)(ms|msec|milliseconds|minutes|hours|days|kib|mib|gib|kilobytes|megabytes|bits)(_|$)"
)


@dataclass
class Metric:
    """One metric with one sample."""

    name: str
    labels: dict[str, str]
    value: float


def read(text: str) -> dict[str, Metric]:
    """Read a file; an AssertionError tells what is wrong with it."""
    assert text.endswith("\n")
    lines, found = text.splitlines(), {}
    assert len(lines) % 3 == 0
    for one, two, three in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        helped, typed, sample = _HELP.fullmatch(one), _TYPE.fullmatch(two), _SAMPLE.fullmatch(three)
        assert helped, one
        assert typed, two
        assert sample, three
        assert helped[1] == typed[1] == sample[1]
        assert sample[1] not in found
        found[sample[1]] = Metric(sample[1], _labels(sample[2]), float(sample[3]))
        _lint(sample[1], typed[2])
    return found


def _labels(text: str) -> dict[str, str]:
    labels, at = {}, 0
    while at < len(text):
        one = _LABEL.match(text, at)
        assert one, text[at:]
        assert one[1] not in labels
        labels[one[1]] = re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), one[2])
        at = one.end()
    return labels


def _lint(name: str, kind: str) -> None:
    assert name.startswith("backupctl_")
    assert name.islower()
    assert not _NOT_BASE_UNITS.search(name), name
    assert kind == "gauge"  # values of the last command go up and down
    assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_gauge"))
    assert ("timestamp" in name or "duration" in name or "frozen" in name) == name.endswith("_seconds"), name
