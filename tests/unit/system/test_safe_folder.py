# SPDX-License-Identifier: GPL-2.0-or-later
"""Where root may write: behind no folder and no link that somebody else could turn."""

import os
from pathlib import Path

import pytest

from backupctl.errors import UsageError
from backupctl.system import safe_folder

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the rule is for root, and takes root to try")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "above" / "folder"
    made.mkdir(parents=True)
    return made


def refused(path: Path, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        safe_folder.resolve(path)


def test_a_folder_that_is_roots_alone_will_do_and_what_is_missing_is_as_it_stands(folder):
    assert safe_folder.resolve(folder / "vda.raw") == folder / "vda.raw"
    assert safe_folder.resolve(folder / "new" / "vda.raw") == folder / "new" / "vda.raw"
    assert safe_folder.resolve(folder / "new" / ".." / "vda.raw") == folder / "vda.raw"


@pytest.mark.parametrize("which", ["folder", "above"])
def test_a_folder_of_somebody_else_is_refused_and_so_is_one_below_it(folder, which):
    os.chown(folder if which == "folder" else folder.parent, NOBODY, 0)
    refused(folder / "vda.raw", f"{which} belongs to user {NOBODY}")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("which", ["folder", "above"])
def test_a_folder_that_others_may_write_is_refused_unless_it_is_sticky(folder, which, mode):
    open_one = folder if which == "folder" else folder.parent
    open_one.chmod(mode)
    refused(folder / "vda.raw", f"others may write to .*{which} .mode 0{mode:o}")
    open_one.chmod(mode | 0o1000)
    assert safe_folder.resolve(folder / "vda.raw") == folder / "vda.raw"


def test_a_sticky_folder_of_somebody_else_is_refused(folder):
    folder.chmod(0o1777)
    os.chown(folder, NOBODY, 0)
    refused(folder / "vda.raw", "belongs to user")


def test_a_file_of_somebody_else_at_the_end_is_no_danger(folder):
    (folder / "vda.raw").touch()
    os.chown(folder / "vda.raw", NOBODY, NOBODY)
    assert safe_folder.resolve(folder / "vda.raw") == folder / "vda.raw"


@pytest.mark.parametrize("rest", ["", "vda.raw"])
def test_a_link_is_followed_if_it_is_roots(folder, rest):
    link = folder / "link"
    link.symlink_to(folder.parent)
    assert safe_folder.resolve(link / rest) == folder.parent / rest
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    refused(link / rest, f"link belongs to user {NOBODY}")


def test_where_a_link_leads_is_looked_at_on_the_whole_way(folder, tmp_path):
    """From a safe folder, by a link of root's, into one of somebody else's that leads on to a safe one."""
    turned = tmp_path / "turned"
    turned.mkdir()
    (turned / "on").symlink_to(folder)
    (tmp_path / "link").symlink_to("turned/on")
    assert safe_folder.resolve(tmp_path / "link" / "vda.raw") == folder / "vda.raw"
    os.chown(turned, NOBODY, 0)
    refused(tmp_path / "link" / "vda.raw", "turned belongs to user")


def test_links_without_end_are_an_error(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="Too many levels"):
        safe_folder.resolve(tmp_path / "link")


def test_who_is_not_root_may_write_where_he_may(folder, monkeypatch):
    os.chown(folder, NOBODY, 0)
    folder.chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert safe_folder.resolve(folder / "vda.raw") == folder / "vda.raw"
