# SPDX-License-Identifier: GPL-2.0-or-later
"""The remote program as it is sent to its host: the sources of the modules that it needs, and their loader.

The remote host needs Python 3.11 and its standard library, nothing else. Nothing is stored there.
"""

import ast
import json
import shlex
from functools import lru_cache
from pathlib import Path

import backupctl

MAIN = "backupctl.vm.remote.program"
IMAGES = "backupctl.vm.remote.image_server"
"""The module that a run needs there which reads the images of a VM that is off."""
NEEDS_PYTHON = (3, 11)
LENGTH_DIGITS = 8
_ROOT = Path(backupctl.__file__).parent.parent
_LOADER = (
    "import sys;"
    f"sys.version_info<{NEEDS_PYTHON}and sys.exit(126);"
    "import json,os;from importlib import abc,machinery,util as u\n"
    "def r(n):\n"
    " b=b''\n"
    " while len(b)<n:\n"
    "  c=os.read(0,n-len(b))\n"
    "  c or sys.exit(125)\n"
    "  b+=c\n"
    " return b\n"
    f"s=json.loads(r(int(r({LENGTH_DIGITS}))))\n"
    "class F(abc.MetaPathFinder,abc.InspectLoader):\n"
    " def find_spec(self,n,p=None,t=None):\n"
    "  return n in s and u.spec_from_loader(n,self,is_package=s[n][0])or None\n"
    " def is_package(self,n):return s[n][0]\n"
    " def get_source(self,n):return s[n][1]\n"
    "sys.meta_path.insert(0,F())\n"
    f"from {MAIN} import main\n"
    "main()"
)


def command() -> str:
    """Return the remote command, as a shell takes it. Its input begins with `content`."""
    # `exec` of one line: a C shell does not take quotes with newlines in them.
    return f"exec python3 -I -S -c {shlex.quote(f'exec({_LOADER!r})')}"


@lru_cache(maxsize=2)
def content(*, images: bool = False) -> bytes:
    """Return the sources, with their length before them. images: with `IMAGES`."""
    sources = {}
    for name, path in modules(images=images).items():
        sources[name] = [path.name == "__init__.py", path.read_text(encoding="utf-8")]
    text = json.dumps(sources).encode()
    return f"{len(text):0{LENGTH_DIGITS}d}".encode() + text


def modules(*, images: bool = False) -> dict[str, Path]:
    """Return the modules of ours that the remote program imports, by name. images: with `IMAGES`."""
    found: dict[str, Path] = {}
    waiting = [MAIN, "backupctl.vm.libvirt.guard_hands", *([IMAGES] if images else [])]
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if path is None or name in found:
            continue
        found[name] = path
        parent = name.rpartition(".")[0]
        waiting += [*_imports(path), *([parent] if parent else [])]
    return found


def _path(name: str) -> Path | None:
    """Return a module's file; None for what is no module of ours."""
    below = _ROOT.joinpath(*name.split("."))
    if not name.startswith("backupctl"):
        return None
    for path in (below.with_suffix(".py"), below / "__init__.py"):
        if path.is_file():
            return path
    return None


def _imports(path: Path) -> set[str]:
    """Name what a module imports when it is loaded.

    What the type checker alone looks at is left out, and so is what a function imports.
    """
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting += ast.iter_child_nodes(node)
    return found
