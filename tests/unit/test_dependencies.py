# SPDX-License-Identifier: GPL-2.0-or-later
"""What is used of a library without its promise is there, and held by bounds on its version."""

import re
import tomllib
from importlib import metadata

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ["click"])
def test_a_library_whose_insides_are_used_is_bounded_on_both_sides(name):
    (bounds,) = (one.removeprefix(name) for one in PROJECT["dependencies"] if one.startswith(name))
    least, end = re.fullmatch(r">=([0-9.]+),<([0-9.]+)", bounds).groups()
    assert numbers(least) <= numbers(metadata.version(name)) < numbers(end)


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"[0-9]+", version)]
