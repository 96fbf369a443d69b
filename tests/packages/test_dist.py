# SPDX-License-Identifier: GPL-2.0-or-later
"""The wheel and the source distribution: reproducible, complete, and what they install works."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from backupctl import __version__
from fixtures import dist, manual
from tests.conftest import ROOT
from tests.packages.installed import (
    SYSTEM_PYTHON,
    Installed,
    backs_up_and_restores,
    environment,
    install,
    with_dependencies,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution of this tree."""
    return dist.make(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel_installed(built, tmp_path_factory):
    """An environment with nothing but the wheel, its pinned dependencies and the system's packages."""
    programs = environment(tmp_path_factory.mktemp("env") / "venv", "--system-site-packages")
    install(programs, "--no-deps", "--no-index", str(built[0]))
    with_dependencies(programs)
    return programs


def test_both_are_the_same_whatever_the_umask_and_the_time_stamps(built, tmp_path):
    other = tmp_path / "tree"
    dist.copy_tree(other)
    for path in other.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() or path.stat().st_mode & 0o100 else 0o600)
    (newest,) = re.findall(
        r"\d+", subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True)
    )
    command = [sys.executable, "-m", "fixtures.dist", tmp_path / "again"]
    again = {"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": newest}
    subprocess.run(
        command, cwd=other, env=again, check=True, timeout=120, stdout=subprocess.DEVNULL, umask=0o077
    )
    for path in built:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_source_has_every_file_that_git_knows(built):
    listed = dist.tracked()
    if listed is None:
        pytest.skip("not a git checkout")
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    contained = {name for name in listed if not (ROOT / name).is_symlink()}
    assert contained - names == set()
    assert not [name for name in names if re.search(r"\.pyc$|__pycache__|^\.venv|^\.cache", name)]


def test_the_wheel_has_pages_completions_units_and_the_licence(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
    data = f"backupctl-{__version__}.data/data/share"
    assert {f"{data}/{name}" for name in manual.pages()} <= names
    assert f"backupctl-{__version__}.dist-info/licenses/LICENSE" in names
    units = {path.name for path in (ROOT / "contrib/systemd").iterdir()}
    assert {f"backupctl/operations/timers/systemd/{name}" for name in units} <= names
    assert not [name for name in names if name.startswith(("tests/", "fixtures/"))]


def test_the_installed_wheel_backs_up_and_restores(wheel_installed, tmp_path):
    installed = Installed([str(wheel_installed / "backupctl")], tmp_path)
    assert installed.works("--version") == f"backupctl, version {__version__}\n"
    share = wheel_installed.parent / "share"
    assert (share / "man/man1/backupctl-full.1").is_file()
    assert (share / "bash-completion/completions/backupctl").is_file()
    where = subprocess.check_output(
        [wheel_installed / "python", "-P", "-c", "import backupctl; print(backupctl.__file__)"],
        text=True,
        cwd=tmp_path,
    )
    assert where.startswith(str(wheel_installed.parent))
    backs_up_and_restores(installed)


def test_without_libnbd_the_error_says_what_to_install_and_how(built, tmp_path):
    programs = environment(tmp_path / "venv")
    install(programs, "--no-deps", "--no-index", str(built[0]))
    with_dependencies(programs)
    done = Installed([str(programs / "backupctl")], tmp_path).call("list")
    assert done.returncode == 2
    assert "libnbd's Python module, `nbd`, is missing" in done.stderr
    assert "next:  apt install python3-libnbd" in done.stderr
    assert "--system-site-packages" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pip_installs_the_wheel_with_its_pinned_dependencies_in_a_clean_environment(built, tmp_path):
    programs = environment(tmp_path / "venv", "--system-site-packages")
    install(programs, "--require-hashes", "-r", str(ROOT / "requirements.txt"))
    install(programs, "--no-deps", "--no-index", str(built[0]))
    installed = Installed([str(programs / "backupctl")], tmp_path)
    backs_up_and_restores(installed)
    assert "Nothing is left" in installed.works("demo")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pipx_installs_the_source_distribution(built, tmp_path):
    if shutil.which("pipx") is None:
        pytest.skip("pipx is not installed here")
    homes = {
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(tmp_path / "bin"),
        "HOME": str(tmp_path),
    }
    command = ["pipx", "install", "--system-site-packages", "--python", SYSTEM_PYTHON, str(built[1])]
    subprocess.run(command, env={"PATH": "/usr/bin:/bin", **homes}, check=True, timeout=600)
    installed = Installed([str(tmp_path / "bin/backupctl")], tmp_path)
    assert installed.works("--version") == f"backupctl, version {__version__}\n"
