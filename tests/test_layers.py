"""The package's layers: which module may import which, how many files stand at the top, how long they are.

All imports count, those inside functions and those for type checkers too. A module that is started as a process
of its own (``python -m``) is not imported.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "loramix"
# from the bottom up; a module imports its own layer and those before it, never one after it
LAYERS = (
    "errors",
    "defaults",
    "paths",
    "hardware",
    "architectures",
    "formats",
    "prompts",
    "templates",
    "models",
    "pack",
    "runtime.llama",
    "runtime",
    "convert",
    "train",
    "eval",
    "diagnose",
    "server",
    "cluster",
    "commands",
    "cli",
    "",  # loramix/__init__.py names what is public
    "__main__",
    "llm_plugin",
)
MAX_TOP_FILES, MAX_LINES, MAX_FUNCTION = 8, 300, 60
LONG_FUNCTIONS = {
    ("server/openai/routes.py", "router"): "FastAPI's routes are closures over one service",
    ("server/ollama/routes.py", "router"): "FastAPI's routes are closures over one service",
}


@cache
def modules() -> dict[str, Path]:
    """Files of the package by dotted name, without ``loramix.``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports of the package."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                full = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path} has a relative import"
                full = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for imported in full:
                if imported.split(".")[0] == "loramix":
                    inner = imported.removeprefix("loramix").removeprefix(".")
                    found[name].add(inner if inner in known else inner.rpartition(".")[0])
        found[name].discard(name)
    return found


def layer(module: str) -> int:
    """Number of the layer that a module belongs to."""
    for prefix in sorted(LAYERS, key=len, reverse=True):
        if module == prefix or (prefix and module.startswith(prefix + ".")):
            return LAYERS.index(prefix)
    raise AssertionError(f"loramix.{module} belongs to no layer; name its folder in LAYERS")


def test_no_import_goes_up() -> None:
    assert len(modules()) > 100
    up = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in sorted(others)
        if layer(other) > layer(name)
    ]
    assert not up


def test_no_circle_of_files() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def reached(start: str) -> set[str]:
    """All modules of the package that a module imports, directly or through others."""
    found, open_ = {start}, [start]
    while open_:
        for other in imports()[open_.pop()] - found:
            found.add(other)
            open_.append(other)
    return found


def imports_library(module: str, library: str) -> bool:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] == library for name in names)


def test_nothing_that_reaches_pytorch_reaches_llama_cpp() -> None:
    """What training needs of the runtime it asks of child processes, see `loramix.runtime.children`."""
    native = {name for name in modules() if imports_library(name, "llama_cpp")}
    torch = {name for name in modules() if imports_library(name, "torch")}
    assert native and {"train.lora", "train.head_fit", "models.old_gate_torch"} <= torch
    both = {name: reached(name) & native for name in torch if name not in ("__main__",)}
    assert not {name: sorted(found) for name, found in both.items() if found}


def test_few_files_stand_at_the_top() -> None:
    top = sorted(path.name for path in ROOT.glob("*.py") if not path.name.startswith("__"))
    assert "cli.py" in top and len(top) <= MAX_TOP_FILES, top


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    return (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) is not None else 0


def test_files_and_functions_are_short() -> None:
    long = []
    for path in modules().values():
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        if (count := text.count("\n")) > MAX_LINES:
            long.append(f"{name} has {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
                if length > MAX_FUNCTION and (name, node.name) not in LONG_FUNCTIONS:
                    long.append(f"{node.name} of {name} has {length} lines")
    assert not long
    for name, function in LONG_FUNCTIONS:  # an exception that is no longer needed goes
        assert (ROOT / name).is_file() and f"def {function}(" in (ROOT / name).read_text(encoding="utf-8")
