# SPDX-License-Identifier: GPL-2.0-or-later
"""Where root may write: behind no directory and no link that somebody else could turn."""

import os
from pathlib import Path

import pytest

from backupctl.errors import UsageError
from backupctl.system import safe_directory

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the rule is for root, and takes root to try")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "above" / "directory"
    made.mkdir(parents=True)
    return made


def refused(path: Path, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        safe_directory.resolve(path)


def test_a_directory_that_is_roots_alone_will_do_and_what_is_missing_is_as_it_stands(directory):
    assert safe_directory.resolve(directory / "vda.raw") == directory / "vda.raw"
    assert safe_directory.resolve(directory / "new" / "vda.raw") == directory / "new" / "vda.raw"
    assert safe_directory.resolve(directory / "new" / ".." / "vda.raw") == directory / "vda.raw"


@pytest.mark.parametrize("which", ["directory", "above"])
def test_a_directory_of_somebody_else_is_refused_and_so_is_one_below_it(directory, which):
    os.chown(directory if which == "directory" else directory.parent, NOBODY, 0)
    refused(directory / "vda.raw", f"{which} belongs to user {NOBODY}")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("which", ["directory", "above"])
def test_a_directory_that_others_may_write_is_refused_unless_it_is_sticky(directory, which, mode):
    open_one = directory if which == "directory" else directory.parent
    open_one.chmod(mode)
    refused(directory / "vda.raw", f"others may write to .*{which} .mode 0{mode:o}")
    open_one.chmod(mode | 0o1000)
    assert safe_directory.resolve(directory / "vda.raw") == directory / "vda.raw"


def test_a_sticky_directory_of_somebody_else_is_refused(directory):
    directory.chmod(0o1777)
    os.chown(directory, NOBODY, 0)
    refused(directory / "vda.raw", "belongs to user")


def test_a_file_of_somebody_else_at_the_end_is_no_danger(directory):
    (directory / "vda.raw").touch()
    os.chown(directory / "vda.raw", NOBODY, NOBODY)
    assert safe_directory.resolve(directory / "vda.raw") == directory / "vda.raw"


@pytest.mark.parametrize("rest", ["", "vda.raw"])
def test_a_link_is_followed_if_it_is_roots(directory, rest):
    link = directory / "link"
    link.symlink_to(directory.parent)
    assert safe_directory.resolve(link / rest) == directory.parent / rest
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    refused(link / rest, f"link belongs to user {NOBODY}")


def test_where_a_link_leads_is_looked_at_on_the_whole_way(directory, tmp_path):
    """From a safe directory, by a link of root's, into one of somebody else's that leads on to a safe one."""
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "on").symlink_to(directory)
    (tmp_path / "link").symlink_to("turned/on")
    assert safe_directory.resolve(tmp_path / "link" / "vda.raw") == directory / "vda.raw"
    os.chown(turned, NOBODY, 0)
    refused(tmp_path / "link" / "vda.raw", "turned belongs to user")


def test_links_without_end_are_an_error(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="Too many levels"):
        safe_directory.resolve(tmp_path / "link")


def test_who_is_not_root_may_write_where_he_may(directory, monkeypatch):
    os.chown(directory, NOBODY, 0)
    directory.chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert safe_directory.resolve(directory / "vda.raw") == directory / "vda.raw"
