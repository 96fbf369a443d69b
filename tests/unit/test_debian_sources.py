# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU 10.0 comes from the mirror of the machine's own apt: found in either form, strangers ignored."""

import pytest

from fixtures import debian

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEB822 = f"""\
Types: deb deb-src
# a remark
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: {KEYRING}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""


@pytest.fixture
def etc(tmp_path):
    """A directory like /etc/apt with these files."""

    def make(**files):
        (tmp_path / "sources.list.d").mkdir()
        for name, text in files.items():
            if name == "one_line":
                (tmp_path / "sources.list").write_text(text)
            else:
                (tmp_path / "sources.list.d" / f"{name}.sources").write_text(text)
        return tmp_path

    return make


def test_the_deb822_form_is_read_and_the_security_archive_is_another(etc):
    assert debian.sources(etc(debian=DEB822)) == [("deb", "http://mirror.example/debian", KEYRING)]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("deb http://m.example/debian bookworm main", ("deb", "http://m.example/debian", "")),
        ("deb http://m.example/debian/ bookworm main", ("deb", "http://m.example/debian/", "")),
        (
            f"deb [arch=amd64 signed-by={KEYRING}] http://m.example/debian bookworm main",
            ("deb", "http://m.example/debian", KEYRING),
        ),
        (
            "deb mirror+file:/etc/apt/mirrors/debian.list bookworm main",
            ("deb", "mirror+file:/etc/apt/mirrors/debian.list", ""),
        ),
    ],
)
def test_the_one_line_form_is_read(etc, line, found):
    assert debian.sources(etc(one_line=f"# main archive\n{line}\n")) == [found]


@pytest.mark.parametrize(
    "line",
    [
        "# deb http://m.example/debian bookworm main",
        "deb-src http://m.example/debian bookworm main",
        "deb https://packages.example/apt cloud main",
        "deb http://m.example/debian-security bookworm-security main",
    ],
)
def test_strangers_remarks_and_sources_are_no_archive(etc, line):
    with pytest.raises(debian.CannotBeHad, match="no Debian archive"):
        debian.sources(etc(one_line=line + "\n"))


def test_a_disabled_entry_is_no_archive(etc):
    with pytest.raises(debian.CannotBeHad):
        debian.sources(etc(debian=DEB822.replace("Types: deb deb-src", "Enabled: no\nTypes: deb")))
