# SPDX-License-Identifier: GPL-2.0-or-later
"""The command that an error names runs as it stands."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

import backupctl
from backupctl.cli.main import cli
from backupctl.cli.next_command import complete

PACKAGE = Path(backupctl.__file__).parent
COMMANDS = cli.list_commands(click.Context(cli))
RUN = ("--qmp", "unix:/run/web.qmp", "--repository", "/my backup")


def typed(*arguments: str) -> click.Context:
    """Return the context of a command line."""
    root = cli.make_context("backupctl", list(arguments))
    name, command, rest = cli.resolve_command(root, [*root._protected_args, *root.args])
    assert command is not None
    return command.make_context(name, rest, parent=root)


def said() -> list[tuple[str, str]]:
    """Return every next command that the package names, with its gaps filled in, and where.

    What is quoted may be a path with a space, all else is a name.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    if keyword.arg == "next_command":
                        found += [(f"{path.name}:{node.lineno}", text) for text in texts(keyword.value)]
    return found


def texts(node: ast.expr) -> list[str]:
    """Return the texts that an expression may come to; none if it is computed elsewhere."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(map(filled, node.values))]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    return []


def filled(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    found = ast.unparse(part)
    if "shlex.quote(" in found:
        return "'/my dir/x'"
    return "/my dir/x" if "path" in found or "directory}" in found else "web"


@pytest.mark.parametrize(("where", "text"), said(), ids=lambda value: value if ":" in value else "")
def test_every_next_command_is_one_and_nothing_else(where, text):
    """No advice in words, no placeholder, no two commands: that is what `hint` is for."""
    if not text:
        return
    assert re.match(r"(backupctl|apt|chown|chmod|cd|fusermount3|mkdir|qemu-img|systemctl) ", text), where
    assert not re.search(r"\b[A-Z]{4,}\b|[,;…]| or | if ", text), where
    words = shlex.split(text)
    assert "dir/x" not in words, f"{where}: the path is not quoted"
    if words[0] == "backupctl":
        assert words[1] in [*COMMANDS, "web"], where


def test_what_says_where_the_vm_is_is_repeated_for_another_command():
    context = typed("full", "web", *RUN, "--limit", "1M", "--json")
    words = shlex.split(complete(context, "backupctl recover web"))
    assert (words[:3], set(words[3:])) == (["backupctl", "recover", "web"], set(RUN))


def test_a_command_that_does_not_talk_to_the_vm_gets_no_monitor():
    context = typed("full", "web", *RUN)
    assert shlex.split(complete(context, "backupctl verify web")) == [
        *("backupctl", "verify", "web", "--repository", "/my backup")
    ]


def test_the_configuration_is_repeated_on_whichever_side_it_stood(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("")
    for arguments in (
        ["--config", str(path), "full", "web"],
        ["full", "--config", str(path), "web"],
        ["full", "web", "--config", str(path)],
    ):
        for command in ("status web", "config check"):
            assert (
                complete(typed(*arguments), f"backupctl {command}") == f"backupctl {command} --config {path}"
            )


def test_what_the_configuration_says_is_not_repeated_and_what_was_typed_is_as_it_was_typed(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[vm.web]\nqmp = "/q"\nrepository = "/r"\nlimit = "1M"\n')
    context = typed("--config", str(path), "full", "web", "--scratch-size", "1.5G", "--freeze-budget", "3")
    assert context.params["limit"] == 1 << 20
    words = shlex.split(complete(context, "backupctl full web"))
    assert words == [
        *("backupctl", "full", "web", "--config", str(path)),
        *("--scratch-size", "1.5G", "--freeze-budget", "3"),
    ]


def test_the_same_command_again_has_all_options_and_what_is_to_be_different():
    context = typed("incremental", "web", *RUN, "--view", "snapshot-access", "--disk", "a", "--disk", "b")
    words = shlex.split(complete(context, "backupctl incremental web --view fleecing"))
    assert words[:3] == ["backupctl", "incremental", "web"]
    assert words.count("--view") == 1
    assert words[words.index("--view") + 1] == "fleecing"
    assert [words[at + 1] for at, word in enumerate(words) if word == "--disk"] == ["a", "b"]
    assert str(typed(*words[1:]).params["repository"]) == "/my backup"


def test_a_restore_again_has_its_point_and_target():
    context = typed("restore", "web", "20260101T000000Z", "--to", "/srv/x", "--repository", "/r")
    words = shlex.split(complete(context, "backupctl restore --force"))
    again = typed(*words[1:])
    assert (again.params["name"], again.params["point"]) == ("web", "20260101T000000Z")
    assert (again.params["to"], again.params["force"]) == ("/srv/x", True)


def test_what_is_no_command_of_ours_stays_as_it_is():
    context = typed("full", "web")
    for text in ("", "apt install python3-libnbd", "backupctl nonsense web"):
        assert complete(context, text) == text
