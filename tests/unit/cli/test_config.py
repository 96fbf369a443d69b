# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file: what is known is read, what is not is an error that names it."""

import json
import os
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from backupctl.cli import configuration, settings
from backupctl.cli.main import cli
from backupctl.cli.toml_lines import key_lines
from backupctl.errors import UsageError
from backupctl.system.address import Address
from tests.unit.cli.test_command_line import command

EXAMPLE = Path(__file__).parents[3] / "fixtures" / "backupctl.example.toml"


def load(tmp_path, text: str) -> configuration.Config:
    path = tmp_path / "backupctl.toml"
    path.write_text(text)
    return configuration.load(str(path))


def shown(*arguments: str) -> dict[str, tuple[object, str]]:
    """Return the settings that are in force for a command line, each with its value and its source."""
    done = CliRunner().invoke(cli, ["config", "show", *arguments, "--json"], catch_exceptions=False)
    return {one["name"]: (one["value"], one["source"]) for one in json.loads(done.stdout)["settings"]}


def test_the_sample_configuration_loads(tmp_path):
    found = load(tmp_path, EXAMPLE.read_text())
    assert found.of("web").qmp == "unix:/run/qemu/web.qmp"
    assert found.of("web").disks == {"virtio0": "system"}
    assert (found.of("web").repository, found.of("db").repository) == ("/backup", "/backup-db")
    assert (found.of("web").freeze, found.of("db").freeze) == ("auto", "require")


def test_the_command_line_wins_over_the_vms_settings_and_these_over_those_for_all(tmp_path):
    path = tmp_path / "backupctl.toml"
    path.write_text(
        '[defaults]\nlimit = "1M"\nview = "auto"\nscratch = "/s"\nmax_chain = 0\n'
        '[vm.web]\nqmp = "unix:/a"\nlimit = "2M"\nview = "fleecing"\n'
    )
    found = shown("web", "--config", str(path), "--limit", "3M")
    assert found["configuration"] == (str(path), "command line")
    assert found["limit"] == ("3M", "command line")
    assert found["view"] == ("fleecing", "file")
    assert found["scratch"] == ("/s", "file")
    assert found["max_chain"] == (150, "default")
    assert found["keep_daily"] == (None, "default")
    for_any = shown("--config", str(path))
    assert for_any["limit"] == ("1M", "file")
    assert [for_any[name] for name in ("qmp", "agent", "disks")] == [(None, "default")] * 3


def test_show_names_the_line_of_each_setting(tmp_path, monkeypatch):
    path = tmp_path / "backupctl.toml"
    path.write_text('[defaults]\n# a comment\nlimit = "1M"\n\n[vm.web]\nqmp = "unix:/a"\n')
    monkeypatch.setenv("BACKUPCTL_CONFIG", str(path))
    monkeypatch.setenv("QEMU_IMG", "/opt/qemu-img")
    done = CliRunner().invoke(cli, ["config", "show", "web"])
    rows = {line.split()[0]: line.split(None, 2)[1:] for line in done.stdout.splitlines()}
    assert rows["limit"] == ["1M", f"{path}:3"]
    assert rows["qmp"] == ["unix:/a", f"{path}:6"]
    assert rows["configuration"] == [str(path), "environment"]
    assert rows["QEMU_IMG"] == ["/opt/qemu-img", "environment"]
    assert rows["freeze"] == ["auto", "default"]


def test_show_of_a_vm_that_is_not_configured_asks_what_was_meant(tmp_path):
    path = tmp_path / "backupctl.toml"
    path.write_text('[vm.webserver]\nqmp = "unix:/a"\n')
    command = ["--config", str(path), "config", "show", "websever"]
    with pytest.raises(UsageError, match="did you mean 'webserver'"):
        cli.main(command, standalone_mode=False)
    assert cli.main([*command, "--qmp", "/q"], standalone_mode=False) is None


def test_all_mistakes_are_told_at_once_each_with_its_line(tmp_path):
    path = tmp_path / "backupctl.toml"
    path.write_text(
        '[defaults]\nreposotory = "/r"\nfreeze = "sometimes"\nqmp = "/q"\n\n'
        '[vm.web]\nlimit = "fast"\nkeep_daily = """\n7"""\nkeep_within = "2 weeks"\n'
        'disks = { vda = "a", vdb = "a" }\n[vm."db".disks]\nvda = "../x"\n[vms]\n'
    )
    done = CliRunner().invoke(cli, ["--config", str(path), "config", "check", "--json"])
    found = json.loads(done.stdout)
    assert isinstance(done.exception, UsageError)
    assert [one["line"] for one in found["mistakes"]] == [2, 3, 4, 7, 8, 10, 11, 13, 14]
    said = "\n".join(one["message"] for one in found["mistakes"])
    for part in (
        *("did you mean 'repository'?", "one of: auto, require, never", "it belongs in [vm.NAME]"),
        *("limit in [vm.web]", "a whole number", "keep_within in [vm.web]", "vda and vdb", "disk name"),
        "did you mean 'vm'?",
    ):
        assert part in said
    with pytest.raises(UsageError) as caught:
        configuration.load(str(path))
    assert all(f"line {one['line']}: {one['message']}" in caught.value.message for one in found["mistakes"])
    assert caught.value.next_command == "backupctl config check"


def test_a_right_configuration_is_said_to_be_so(tmp_path):
    path = tmp_path / "backupctl.toml"
    path.write_text(EXAMPLE.read_text())
    done = CliRunner().invoke(cli, ["config", "check", "--config", str(path)])
    assert (done.exit_code, done.stdout) == (0, f"{path}: no mistakes, 2 VMs\n")
    done = CliRunner().invoke(cli, ["config", "check", "--config", str(path), "--json"])
    found = json.loads(done.stdout)
    assert found == {"configuration": str(path), "ok": True, "vms": ["web", "db"], "mistakes": []}


def test_every_key_says_what_it_must_be(tmp_path):
    """A table is nothing that any of them may be."""
    keys = [key for key in settings.settable() if key not in ("disks", "image")]
    text = "".join(f"{key} = {{}}\n" for key in keys)
    with pytest.raises(UsageError) as caught:
        load(tmp_path, f"[vm.web]\n{text}")
    assert [key for key in keys if f"{key} in [vm.web] must be " not in caught.value.message] == []


def test_every_key_is_an_option_of_the_same_name_but_tables_and_what_an_option_says_otherwise():
    options = {option.name: option for option in command("incremental").params}
    options |= {
        option.name: option
        for name in ("prune", "run", "check", "restore-test")
        for option in command(name).params
    }
    for key in (*settings.settable(), *settings.settable_for_run()):
        if key not in ("disks", "when_off"):  # --if-running is one value of the latter
            # Those of a restore test belong to a command of that name.
            spelt = key.removeprefix("restore_test_").replace("_", "-")
            spelt = spelt.replace("include-files", "include-file")  # one of several
            assert options[key].opts == [f"--{spelt}"]


def test_how_a_run_is_gone_about_has_a_table_of_its_own(tmp_path):
    path = tmp_path / "backupctl.toml"
    path.write_text('[run]\njobs = 4\nwait_lock = 600\n[vm.web]\nqmp = "/q"\nfull_every = "30d"\n')
    found = shown("web", "--config", str(path), "--wait-lock", "5")
    assert (found["jobs"], found["wait_lock"]) == ((4, "file"), ("5", "command line"))
    assert (found["full_every"], found["max_time"]) == (("30d", "file"), (0.0, "default"))
    done = CliRunner().invoke(cli, ["config", "show", "--config", str(path)])
    assert f"{path}:2" in next(line for line in done.stdout.splitlines() if line.startswith("jobs "))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a = 1\n\n[b]\nc = 2\n", {("a",): 1, ("b",): 3, ("b", "c"): 4}),
        (
            "[b.'c d']\ne.f = 1\r\n",
            {("b",): 1, ("b", "c d"): 1, ("b", "c d", "e"): 2, ("b", "c d", "e", "f"): 2},
        ),
        ("a = '''\n[x]\nb = 2\n'''\nc = [\n1,\n]\nd = 1", {("a",): 1, ("c",): 5, ("d",): 8}),
        ("'a=b' = 1 # c = 2\n", {("a=b",): 1}),
        ("a = [\n" + "1,\n" * 300 + "]\nb = 1\n", {("b",): 303}),
        ("", {}),
    ],
)
def test_the_lines_of_keys_are_found_however_they_are_written(text, lines):
    assert key_lines(text) == lines


def test_a_value_of_many_lines_is_passed_over_in_no_long_time():
    begun = time.monotonic()
    assert key_lines("a = [\n" + "1,\n" * 40_000 + "]\nb = 1\n") == {("b",): 40_003}
    assert time.monotonic() - begun < 20  # a minute, were each line tried as the beginning of a value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[vm.web]\nqpm = "unix:/a"\n', "qpm"),
        ("[vm.web]\nqmp = 7\n", "qmp"),
        ('[defaults]\nfreeze_budget = "long"\n', "freeze_budget"),
        ("[defaults]\nfreeze_budget = -1\n", "freeze_budget"),
        ("[defaults]\nmax_chain = 181\n", "a whole number, 0 to 180"),
        ("[defaults]\nkeep_checkpoints = -1\n", "keep_checkpoints"),
        ("[defaults]\nkeep_checkpoints = true\n", "keep_checkpoints"),
        ("[defaults]\nkeep_checkpoints = 1.5\n", "keep_checkpoints"),
        ('[default]\nlimit = "1M"\n', "default"),
        ('[vm.web]\n[vm.web.disks]\nvda = "../../etc"\n', "disk name"),
        ('[vm."../x"]\nqmp = "unix:/a"\n', "VM name"),
        ("[vm\n", "cannot read"),
        ("[defaults]\nfreeze_budget = nan\n", "freeze_budget"),
        ("[defaults]\nfreeze_budget = inf\n", "freeze_budget"),
        ("[defaults]\nfreeze_budget = 1e300\n", "freeze_budget"),
        ('[defaults]\nfreeze = "sometimes"\n', "auto, require, never"),
        ('[vm.web]\nview = "x"\n', "fleecing"),
        ('[vm.web]\non_broken_chain = "x"\n', "scan"),
        ("[vm.web.disks]\nvda = 5\n", "disk name"),
        ("a = " + "[" * 100_000, "cannot read"),
        ("a = " + "9" * 5000, "cannot read"),
        ("a = '\0'\n", "cannot read"),
        ('[defaults]\nrepository = "backup"\n', "repository in [defaults] must be an absolute path"),
        ('[vm.web]\nscratch = "./s"\n', "scratch in [vm.web] must be an absolute path"),
        ('[vm.web]\nqmp = "unix:web.qmp"\n', "qmp in [vm.web] must be an absolute path"),
        ('[vm.web]\nagent = "web.agent"\n', "agent in [vm.web] must be an absolute path"),
        ('[vm.web]\nqmp = "tcp:host"\n', "qmp in [vm.web]"),
        ('[vm.a]\nqmp = "unix:/q"\n[vm.b]\nqmp = "/q"\n', "[vm.a] and [vm.b] have the same qmp"),
        (
            '[defaults]\nrepository = "/r"\n[vm.a]\nqmp = "/q"\n[vm.b]\nqmp = "//q"\nrepository = "/r/"\n',
            "[vm.a] and [vm.b] have the same qmp",
        ),
        (
            '[vm.a]\nqmp = "/q1"\nagent = "/a"\n[vm.b]\nqmp = "/q2"\nagent = "/a"\n',
            "[vm.a] and [vm.b] have the same agent",
        ),
        ('[vm.web]\nlibvirt = "qemu:///system"\nqmp = "/q"\n', "libvirt and qmp in [vm.web] cannot be used"),
        ('[vm.web]\nlibvirt = "qemu:///system"\nagent = "/a"\n', "libvirt and agent in [vm.web] cannot"),
        ('[vm.web]\nlibvirt = "qemu+tcp://host/system"\n', "is not a libvirt URI"),
        ('[vm.web]\nlibvirt = "qemu+ssh://host/session"\n', "invalid libvirt URI"),
        ('[vm.web]\nlibvirt = "qemu+ssh://host/system?no_verify=1"\n', "ssh_config has the rest"),
        ('[vm.web]\ndomain = "web"\n', "domain in [vm.web] needs libvirt"),
        (
            '[vm.a]\nlibvirt = "qemu:///system"\ndomain = "b"\n[vm.b]\nlibvirt = "qemu:///system"\n',
            "[vm.a] and [vm.b] have the same domain",
        ),
        ('[vm.web.disks]\nvda = "x"\nvdb = "x"\n', "vda and vdb in [vm.web.disks]"),
        ("[run]\njobs = 0\n", "jobs in [run] must be a whole number, 1 to 100"),
        ("[run]\nrandom_delay = -1\n", "random_delay in [run] must be a number of seconds"),
        ("[run]\nlimit = 1\n", "unknown key 'limit' in [run]"),
        ("[defaults]\njobs = 2\n", "it belongs in [run]"),
        ('[defaults]\nfull_every = "monthly"\n', "full_every in [defaults]"),
        ("[vm.web]\nverify_percent = 101\n", "a number, 0 to 100"),
        ("#" * 300_000, "larger"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, said):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert said in caught.value.message


@pytest.mark.parametrize(
    "text", ["tcp:host", "tcp:host:0", "tcp:h:" + "1" * 5000, "tcp:host:99999", "tcp::1", "unix:", ""]
)
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(UsageError):
        Address.parse(text)


def test_one_vm_may_be_backed_up_to_two_repositories(tmp_path):
    text = '[vm.web]\nqmp = "/q"\nrepository = "/r1"\n[vm.web-offsite]\nqmp = "/q"\nrepository = "/r2"\n'
    assert load(tmp_path, text).repositories() == (Path("/r1"), Path("/r2"))


def test_a_home_may_begin_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load(tmp_path, '[defaults]\nrepository = "~/r"\n').repositories() == (Path("/home/me/r"),)


def test_nothing_is_read_from_the_current_directory(tmp_path, monkeypatch):
    """There anybody may have put it."""
    (tmp_path / "backupctl.toml").write_text('[vm.web]\nqmp = "unix:/theirs"\n')
    (tmp_path / "backupctl").mkdir()
    (tmp_path / "backupctl/backupctl.toml").write_text('[vm.web]\nqmp = "unix:/theirs"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BACKUPCTL_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for directory in ("", ".", "./"):
        monkeypatch.setenv("XDG_CONFIG_HOME", directory)
        assert "web" not in configuration.load(None).vms


@pytest.mark.parametrize("given", ["--config", "BACKUPCTL_CONFIG", "XDG_CONFIG_HOME"])
def test_a_file_that_others_may_write_is_refused_wherever_it_was_named(tmp_path, monkeypatch, given):
    path = tmp_path / "backupctl" / "backupctl.toml"
    path.parent.mkdir()
    path.write_text("")
    path.chmod(0o666)
    monkeypatch.delenv("BACKUPCTL_CONFIG", raising=False)
    if given != "--config":
        monkeypatch.setenv(given, str(path if given == "BACKUPCTL_CONFIG" else tmp_path))
    command = ["config", "check", *(["--config", str(path)] if given == "--config" else [])]
    with pytest.raises(UsageError, match=r"backupctl.toml is not trusted: .* \(mode 0666\)"):
        cli.main(command, standalone_mode=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_home_of_somebody_else_is_passed_over_if_there_is_nothing_in_it(tmp_path, monkeypatch):
    """As `sudo -E` leaves it to root."""
    home, system = tmp_path / "home", tmp_path / "system.toml"
    directory = home / ".config" / "backupctl"
    directory.mkdir(parents=True)
    os.chown(home, 12345, 12345)
    system.write_text('[vm.web]\nqmp = "/q"\n')
    for name in ("BACKUPCTL_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(configuration, "SYSTEM_FILE", system)
    assert list(configuration.load(None).vms) == ["web"]
    (directory / "backupctl.toml").write_text("")
    with pytest.raises(UsageError, match="home is not trusted: it belongs to user 12345"):
        configuration.load(None)


def test_a_named_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        configuration.load(str(tmp_path / "none"))


@pytest.mark.parametrize("budget", ["nan", "inf", "-1", "0", "1e300"])
def test_a_freeze_budget_that_can_not_be_is_wrong_use(tmp_path, budget):
    command = ["full", "web", "--qmp", "unix:/x", "--repository", str(tmp_path / "r")]
    with pytest.raises(click.BadParameter) as caught:
        cli.main([*command, f"--freeze-budget={budget}"], standalone_mode=False)
    assert "--freeze-budget" in caught.value.format_message()


@pytest.mark.parametrize(
    ("table", "model"),
    [
        ("metrics", settings.MetricsSettings),
        *settings.TABLES.items(),
        *((f"vm.web.{name}", model) for name, model in settings.TABLES.items()),
    ],
)
def test_every_key_of_a_table_says_what_it_must_be(tmp_path, table, model):
    keys = model.__struct_fields__
    with pytest.raises(UsageError) as caught:
        load(tmp_path, f"[{table}]\n" + "".join(f"{key} = {{}}\n" for key in keys))
    assert [key for key in keys if f"{key} in [{table}] must be " not in caught.value.message] == []


MONITORING = """
[metrics]
textfile = "/var/lib/metrics"
[hooks]
before = ["/bin/a", "b c"]
after = ["/bin/d"]
timeout = 5
[notify]
mail = "root, a@example.org"
webhook = "https://hooks.example.org/s3cr3t?key=s3cr3t"
success = true
[vm.web]
qmp = "/q"
[vm.web.hooks]
after = []
[vm.web.notify]
ntfy = "https://ntfy.example.org/s3cr3t"
success = false
"""


def test_a_vm_overrides_single_keys_of_hooks_and_notices(tmp_path):
    found = load(tmp_path, MONITORING)
    own, other = found.of("web"), found.of(None)
    assert (own.hooks.before, own.hooks.after, own.hooks.timeout) == (["/bin/a", "b c"], [], 5)
    assert other.hooks.after == ["/bin/d"]
    assert (own.notify.mail, own.notify.success, other.notify.success) == ("root, a@example.org", False, True)
    assert (own.notify.ntfy is None, other.notify.ntfy) == (False, None)


def test_show_names_hooks_and_notices_and_no_secret(tmp_path):
    path = tmp_path / "backupctl.toml"
    path.write_text(MONITORING)
    done = CliRunner().invoke(cli, ["config", "show", "web", "--config", str(path)])
    assert "s3cr3t" not in done.stdout
    rows = {line.split()[0]: line.split(None, 1)[1] for line in done.stdout.splitlines() if line.strip()}
    assert rows["metrics.textfile"].split() == ["/var/lib/metrics", f"{path}:3"]
    assert rows["hooks.before"].split("  ")[0] == "/bin/a 'b c'"
    assert rows["hooks.after"].endswith(f"{path}:15")
    assert rows["notify.webhook"].split() == ["https://hooks.example.org/***", f"{path}:10"]
    assert rows["notify.ntfy"].split() == ["https://ntfy.example.org/***", f"{path}:17"]
    assert "s3cr3t" not in CliRunner().invoke(cli, ["config", "show", "--config", str(path), "--json"]).stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[hooks]\nbefore = "/bin/a b"\n', "before in [hooks] must be a list of quoted strings"),
        ('[hooks]\nbefore = ["a"]\n', "before in [hooks]: the program must be an absolute path, not 'a'"),
        ("[hooks]\nbefore = [7]\n", "before in [hooks] must be a list"),
        ('[hooks]\nbefore = ["/bin/a", "\\u0000"]\n', "null byte"),
        ("[hooks]\ntimeout = 0\n", "timeout in [hooks] must be a number of seconds"),
        ('[hooks]\nbefor = ["/bin/a"]\n', "did you mean 'before'?"),
        ('[vm.web.hooks]\nbefor = ["/bin/a"]\n', "line 2: unknown key 'befor' in [vm.web.hooks]"),
        ('[defaults]\nhooks = "x"\n', "unknown key 'hooks' in [defaults]"),
        ('hooks = "x"\n', "[hooks] must be a table"),
        ('[notify]\nmail = "a b"\n', "is not a mail address"),
        ('[notify]\nmail = "a\\nBcc: b"\n', "is not a mail address"),
        ('[notify]\nsendmail = "sendmail"\n', "sendmail in [notify] must be an absolute path"),
        ("[notify]\nsuccess = 1\n", "success in [notify] must be true or false"),
        ('[notify]\nrepeat = "soon"\n', "repeat in [notify]"),
        *(
            (f'[notify]\nwebhook = "{url}"\n', "webhook in [notify]: it must")
            for url in (
                "ftp://h/s3cr3t",
                "file:///s3cr3t",
                "https:///s3cr3t",
                "s3cr3t",
                "https://u:s3cr3t@h/",
            )
        ),
        *(
            (f'[notify]\nwebhook = "{url}"\n', "webhook in [notify]: it is not a URL")
            for url in (
                "https://h/s3cr3t x",
                "https://h:s3cr3t/",
                "https://h/s3cr3t\\r\\nX: y",
                "https://h/é",
            )
        ),
        ('[metrics]\ntextfile = "metrics"\n', "textfile in [metrics] must be an absolute path"),
        ('[vm.web]\nmax_age = "1 day"\n', "max_age in [vm.web]"),
    ],
)
def test_what_is_wrong_about_monitoring_is_named_and_no_secret_shown(tmp_path, text, said):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    assert said in caught.value.message
    assert "s3cr3t" not in caught.value.message
