"""Which module may import which, use transformers, or print."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import regraft
from regraft.restoration.base import METHODS

ROOT = Path(regraft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ORDER = (
    *("data", "models", "pruning", "heads", "patch", "evaluation", "defence", "settings"),
    *("loading", "restoration", "flags", "report", "recipes", "stages"),
    # a recipe's run, then the analyses of it, then all runs of a recipe
    *(f"runs.{name}" for name in ("run_dir", "passes", "reporting", "comparing")),
    *(
        "runs.publishing",
        "console",
        "arguments",
        "api",
        "runs.plan",
        "analysis",
        "runs.pipeline",
        "runs.sweep",
    ),
    *("runs.bundle", "runs.bundle_check", "cli"),
)
FREE = {
    *("regraft", "errors", "launcher", "disk", "registry", "progress", "distributed", "costs"),
    *("data.example", "settings.base", "runs"),
}
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__").removesuffix("__init__") or "regraft"


MODULES = {"regraft." + _module(path) for path in FILES}


def _imported(path: Path) -> Iterator[str]:
    """Every imported module; `from regraft import stages` gives "regraft.stages"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            for name in (f"{module}.{alias.name}" for alias in node.names):
                yield name if name in MODULES else module


def _room(module: str) -> str:
    """The name in `ORDER` or `FREE` of a module, or of the folder that it is in."""
    names = {*ORDER, *FREE}
    return module if module in names else module.split(".")[0]


def _own(path: Path) -> list[str]:
    names = (name for name in _imported(path) if name.split(".")[0] == "regraft")
    return [name.removeprefix("regraft.") for name in names]


def test_every_module_has_its_place() -> None:
    rooms = {_room(_module(path)) for path in FILES}
    assert rooms <= {*ORDER, *FREE}, f"not in the order: {rooms - {*ORDER, *FREE}}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_one_way(path: Path) -> None:
    module = _module(path)
    if module == "regraft":  # the functions of `api`, imported when they are asked for
        assert set(_own(path)) == {"api"}
        return
    imported = [(name, _room(name)) for name in _own(path)]
    if _room(module) in FREE:
        assert {room for _, room in imported} <= FREE, f"{module} is free for all: {imported}"
        return
    for name, room in imported:
        if room not in FREE:
            assert ORDER.index(room) <= ORDER.index(_room(module)), f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_models_know_transformers(path: Path) -> None:
    module = _module(path)
    if module.split(".")[0] == "models":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            raise AssertionError(f"{module} imports transformers")
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("transformers") for alias in node.names), module


REPOSITORY = Path(__file__).parents[1]
TOOLS = sorted(one for room in ("benchmarks", "scripts") for one in REPOSITORY.glob(f"{room}/*.py"))


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_benchmarks_and_scripts_import_names_that_exist(path: Path) -> None:
    """No other test runs most of them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regraft"):
            module = importlib.import_module(node.module or "")
            missing = [
                one.name
                for one in node.names
                if not hasattr(module, one.name) and f"{node.module}.{one.name}" not in MODULES
            ]
            assert missing == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_the_command_line_prints(path: Path) -> None:
    if _module(path).split(".")[0] in ("cli", "console"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno} prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            written = f"{node.value.id}.{node.attr}"
            assert written not in ("sys.stdout", "sys.stderr"), f"{path.name}:{node.lineno}"


def test_help_is_quick() -> None:
    """Nobody waits for transformers, scipy or matplotlib to read `--help`."""
    code = (
        "import sys, regraft.cli; print([name for name in "
        "('transformers', 'scipy', 'matplotlib', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_method_is_imported_without_reports_data_sets_and_other_methods() -> None:
    """In a process each, since modules stay imported; torch, which takes long, is there before."""
    others = ("regraft.report", "regraft.data.readers.", "regraft.restoration.methods.")
    code = (
        "import os, sys, torch\n"
        "from importlib import import_module\n"
        f"for name in {[one.replace('-', '_') for one in METHODS.built_in()]}:\n"
        "    if os.fork():\n"
        "        os.wait()\n"
        "        continue\n"
        "    own = 'regraft.restoration.methods.' + name\n"
        "    import_module(own)\n"
        f"    found = [one for one in sys.modules if one.startswith({others})]\n"
        "    print(name, [one for one in found if f'{own}.' not in f'{one}.'], flush=True)\n"
        "    os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [one.replace("-", "_") for one in METHODS.built_in()]
    assert done.stdout.splitlines() == [f"{name} []" for name in names]


def test_the_map_names_every_module_and_no_other() -> None:
    """But for folders of which the map says that there is a file each."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text.partition("```\nsrc/regraft/\n")[2].partition("\ntests/")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", house))
    plugins = {"readers", "pruners", "methods", "judges", "settings", "cli"}
    there = {path for path in FILES if not plugins & set(path.relative_to(ROOT).parts)}
    assert {path.name for path in there} - {"__init__.py", "__main__.py"} <= named
    assert named <= {path.name for path in FILES}
