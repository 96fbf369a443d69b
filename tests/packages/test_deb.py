# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: built, installed, used, upgraded and removed, on the Debian that it is for."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from backupctl import __version__
from fixtures import deb, deb_tree, debootstrap
from fixtures.deb import RELEASES
from fixtures.debian import CannotBeHad
from tests.conftest import ROOT
from tests.packages.installed import SITE, Installed

NEWER = "99.0"
EXAMPLE = "/etc/backupctl/backupctl.toml.example"
CONFIGURATION = "/etc/backupctl/backupctl.toml"
LEFT = "find / -xdev ( -name *backupctl* -o -path */backupctl/* ) -not -path /proc/* -not -path /root/*"


def test_the_launcher_takes_no_module_from_the_directory_or_the_environment_that_it_is_called_in(tmp_path):
    """Root may call it anywhere, such as in /tmp."""
    for name in ("click.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger')")
    private = tmp_path / "private"
    (private / "backupctl").mkdir(parents=True)
    (private / "backupctl/__init__.py").touch()
    (private / "backupctl/__main__.py").write_text("import json\ndef main(): print('ours')\n")
    program = tmp_path / "backupctl"
    program.write_text(deb_tree.LAUNCHER.replace(f"/{deb_tree.PRIVATE}", str(private)))
    program.chmod(0o755)
    done = subprocess.run(
        [program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("ours\n", "")


def test_demo_and_drills_find_the_modules_of_the_package_wherever_they_are_called(tmp_path):
    """They start further Pythons, which know nothing of the launcher."""
    private, home = tmp_path / "private", tmp_path / "home"
    home.mkdir()
    shutil.copytree(ROOT / "backupctl", private / "backupctl", ignore=shutil.ignore_patterns("__pycache__"))
    for path in SITE.iterdir():
        if "backupctl" not in path.name:
            (private / path.name).symlink_to(path)
    program = tmp_path / "backupctl"
    program.write_text(deb_tree.LAUNCHER.replace(f"/{deb_tree.PRIVATE}", str(private)))
    program.chmod(0o755)
    (home / "click.py").write_text("raise SystemExit('a stranger')")
    installed = Installed([str(program)], home)
    assert "Nothing is left" in installed.works("demo")
    assert "1 passed" in installed.works("drill", "kill-full-attach")


def test_each_file_is_where_debian_looks_for_it_and_nothing_else_is_there(tmp_path):
    wheels = {
        "backupctl-1-py3-none-any.whl": (
            "backupctl/x.py",
            "backupctl-1.data/data/share/man/man1/backupctl.1",
            "backupctl-1.data/data/share/zsh/site-functions/_backupctl",
            "backupctl-1.data/data/share/doc/backupctl/examples/backupctl",
        ),
        "qemu_qmp-1-py3-none-any.whl": (
            "qemu/qmp/legacy.py",
            "qemu/qmp/qmp_client.py",
            "qemu_qmp-1.dist-info/licenses/LICENSE",
            "qemu_qmp-1.data/data/share/man/man1/other.1",
            "qemu_qmp-1.data/scripts/other",
            "numpy/_core/tests/test_x.py",
            "numpy/testing/x.py",
        ),
    }
    for wheel, names in wheels.items():
        with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
            for name in names:
                archive.writestr(name, "")
    deb_tree.lay_out(tmp_path, tmp_path / "root", "/lib/systemd/system")
    found = {
        str(path.relative_to(tmp_path / "root")) for path in (tmp_path / "root").rglob("*") if path.is_file()
    }
    assert {name for name in found if "/doc/" not in name} == {
        "etc/backupctl/backupctl.toml.example",
        "usr/bin/backupctl",
        "usr/share/man/man1/backupctl.1",
        "usr/share/zsh/vendor-completions/_backupctl",
        *(f"lib/systemd/system/{path.name}" for path in (ROOT / "contrib/systemd").iterdir()),
        *(
            f"usr/lib/backupctl/{name}"
            for name in (
                "backupctl/x.py",
                "qemu/qmp/qmp_client.py",
                "qemu_qmp-1.dist-info/licenses/LICENSE",
                "numpy/testing/x.py",
            )
        ),
    }


@pytest.fixture(scope="module", params=sorted(RELEASES))
def release(request):
    return RELEASES[request.param]


@pytest.fixture(scope="module")
def package(release, tmp_path_factory):
    if shutil.which("dpkg-buildpackage") is None or shutil.which("dh") is None:
        pytest.skip("debhelper is not installed here: fixtures/packages.sh build")
    try:
        return deb.build(release, tmp_path_factory.mktemp("deb"))
    except CannotBeHad as err:
        pytest.skip(str(err))


@pytest.fixture
def system(release):
    try:
        with debootstrap.system(release) as found:
            yield found
    except CannotBeHad as err:
        pytest.skip(str(err))


def newer(package: Path, directory: Path) -> Path:
    """Return the package as a later version, whose example has changed."""
    tree = directory / "tree"
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True, timeout=120)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*$", f"Version: {NEWER}", control.read_text(), flags=re.MULTILINE))
    with (tree / EXAMPLE[1:]).open("a") as file:
        file.write("# newer\n")
    found = directory / "newer.deb"
    subprocess.run(
        ["dpkg-deb", "-Znone", "--root-owner-group", "-b", tree, found],
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    return found


def fleet(system) -> list[dict]:
    """Run all VMs of the example, each in a process of its own; return what each reported."""
    return json.loads(system.call("backupctl", "run", "--all", "--json").stdout)["vms"]


def left(system) -> list[str]:
    return sorted(system.works(*LEFT.split()).split())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_package_is_installed_used_upgraded_removed_and_purged(release, package, system, tmp_path):
    """After a purge only what the user made is left: the configuration, and no compiled module."""
    before = left(system)
    system.works("dpkg", "-i", system.put(package, "first.deb"))
    assert (
        system.works("dpkg-query", "-W", "-f", "${Version}", "backupctl")
        == f"{__version__}~deb{release.number}"
    )
    assert system.works("backupctl", "--version") == f"backupctl, version {__version__}\n"
    assert "not found" not in system.works("backupctl", "version")
    assert "Nothing is left" in system.works("backupctl", "demo")
    assert system.works("stat", "-c", "%a %U", "/etc/backupctl", EXAMPLE).split() == [
        "755",
        "root",
        "644",
        "root",
    ]
    for name in ("man/man1/backupctl-full.1.gz", "man/man5/backupctl.toml.5.gz"):
        system.works("test", "-f", f"/usr/share/{name}")
    for path in (ROOT / "contrib/systemd").iterdir():
        system.works("test", "-f", f"{release.units}/{path.name}")
    assert not [name for name in left(system) if name.startswith("/etc/systemd")]

    system.works("cp", EXAMPLE, CONFIGURATION)
    assert "no mistakes" in system.works("backupctl", "config", "check")
    system.works("dpkg", "--force-confold", "-i", system.put(newer(package, tmp_path), "second.deb"))
    assert system.works("dpkg-query", "-W", "-f", "${Version}", "backupctl") == NEWER
    assert "# newer" in system.works("cat", EXAMPLE)
    assert "# newer" not in system.works("cat", CONFIGURATION)
    assert "Nothing is left" in system.works("backupctl", "demo")

    assert "1 passed" in system.works("backupctl", "drill", "kill-full-attach")
    assert [one["error"]["kind"] for one in fleet(system)] == ["UsageError", "UsageError"]  # no repository

    system.works("dpkg", "-r", "backupctl")
    assert system.call("test", "-e", "/usr/lib/backupctl").returncode == 1
    system.works("test", "-f", EXAMPLE)
    remembered = Path("/var/lib/backupctl")
    system.works("test", "-f", str(remembered / "web.json"))
    kept = {str(remembered / name) for name in ("web", "repository.json")}  # as if a repository were there
    system.works("touch", *kept)
    system.works("dpkg", "-P", "backupctl")
    kept |= {CONFIGURATION, str(Path(CONFIGURATION).parent), str(remembered)}
    assert set(left(system)) - set(before) == kept


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lintian_finds_no_error(release, package):
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed here: fixtures/packages.sh build")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "0", package],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_package_has_the_licence_of_each_package_that_it_contains(release, package):
    listed = subprocess.check_output(["dpkg-deb", "-c", package], text=True)
    packages = set(re.findall(r"\./usr/lib/backupctl/([\w.]+-[\d.]+\.dist-info)/METADATA", listed))
    licences = set(
        re.findall(r"\./usr/lib/backupctl/([\w.]+-[\d.]+\.dist-info)/(?:licenses/)?.*LICEN[SC]E", listed)
    )
    assert len(packages) > 8
    assert packages - licences == set()
    assert "qemu/qmp/legacy.py" not in listed
