"""What `loramix.defaults` holds stands there alone: no other file repeats a name, a list or a value of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loramix import defaults

ROOT = Path(__file__).parent.parent / "loramix"
NAMES = {name: value for name, value in vars(defaults).items() if name.isupper() or name == "__version__"}
# parameters and options that have a default there, whatever number another thing may share with them
PARAMETERS = {
    "n_ctx": "N_CTX",
    "--ctx": "N_CTX",
    "contexts": "CONTEXTS",
    "saved_bytes": "KV_STORE_BYTES",
    "policy": "DEFAULT_POLICY",
    "--policy": "DEFAULT_POLICY",
    "rank": "RANK",
    "--rank": "RANK",
    "--pack": "DEFAULT_PACK",
    "n_cells": "N_CELLS",
    "cells": "N_CELLS",
    "--cells": "N_CELLS",
    "parallel": "PARALLEL",
    "--parallel": "PARALLEL",
    "queue": "QUEUE",
    "--queue": "QUEUE",
    "queue_s": "QUEUE_S",
    "queue_timeout": "QUEUE_S",
    "--queue-timeout": "QUEUE_S",
    "first_token_s": "FIRST_TOKEN_S",
    "first_token_timeout": "FIRST_TOKEN_S",
    "--first-token-timeout": "FIRST_TOKEN_S",
    "total_s": "ANSWER_S",
    "timeout": "ANSWER_S",
    "--timeout": "ANSWER_S",
    "--base": "DEFAULT_PACK",
}


def others() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        if path != ROOT / "defaults.py":
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def test_no_other_module_defines_one_of_these_names() -> None:
    assert len(NAMES) > 15
    again = [
        f"{name}: {target.id}"
        for name, tree in others()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in NAMES
    ]
    assert not again


def test_no_other_module_repeats_a_list_the_default_pack_or_a_pin() -> None:
    lists = {frozenset(value) for value in NAMES.values() if isinstance(value, tuple)}
    assert len(lists) == 3
    again = []
    for name, tree in others():
        for node in ast.walk(tree):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                found = [literal(item) for item in node.elts]
                if all(isinstance(item, str) for item in found) and frozenset(found) in lists:
                    again.append(f"{name}:{node.lineno}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value == defaults.DEFAULT_PACK or defaults.LLAMA_CPP.partition("==")[2] in node.value:
                    again.append(f"{name}:{node.lineno}")
    assert not again


def test_defaults_of_parameters_and_options_are_not_written_out() -> None:
    again, seen = [], 0
    for name, tree in others():
        for node in ast.walk(tree):
            pairs: list[tuple[str, ast.expr | None]] = []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                plain = [*node.args.posonlyargs, *node.args.args]
                pairs += zip(
                    [a.arg for a in plain[len(plain) - len(node.args.defaults) :]],
                    node.args.defaults,
                    strict=True,
                )
                pairs += zip([a.arg for a in node.args.kwonlyargs], node.args.kw_defaults, strict=True)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                pairs.append((node.target.id, node.value))
            elif isinstance(node, ast.Call):
                default = {word.arg: word.value for word in node.keywords}.get("default")
                pairs += [(str(literal(argument)), default) for argument in node.args]
            for parameter, value in pairs:
                if parameter in PARAMETERS and value is not None:
                    seen += 1
                    if literal(value) == NAMES[PARAMETERS[parameter]]:
                        again.append(f"{name}:{node.lineno} {parameter}")  # type: ignore[attr-defined]
    assert seen > 20 and not again


def test_reading_the_defaults_loads_nothing_else() -> None:
    code = (
        "import sys, loramix.defaults; print([m for m in sys.modules if m.startswith(('loramix.', 'numpy'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['loramix.defaults']"
