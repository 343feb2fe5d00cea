"""Greedy answers of an unconverted adapter in PyTorch, computed in a child process and cached in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from loramix.convert.reference import torch_child
from loramix.errors import InvalidArtifact
from loramix.paths import sha256_file, write_text
from loramix.runtime.children import tokenize_rows
from loramix.runtime.detokenize import detokenize
from loramix.runtime.engine import Engine

WEIGHTS = "adapter_model.safetensors"


def torch_answers(
    engine: Engine, adapter: Path, prompts: Sequence[str], max_tokens: int, cache: Path
) -> list[str]:
    """Return greedy answers of a PEFT adapter on the engine's base.

    Args:
        engine: engine with the base and the vocabulary.
        adapter: PEFT directory.
        prompts: prompts, each answered on its own.
        max_tokens: maximum length of an answer in tokens.
        cache: directory of the cached answers.

    Raises:
        InvalidArtifact: the directory has no adapter.
        MissingExtra: torch, transformers or peft is not installed.
        SelfCheckFailed: PyTorch failed.
    """
    if not (adapter / WEIGHTS).is_file():
        raise InvalidArtifact(f"no {WEIGHTS} in {adapter}; give the run directories of training.")
    pairs, _ = tokenize_rows(engine.base_path, [{"prompt": prompt} for prompt in prompts])
    job = {
        "base": str(engine.base_path),
        "adapter": str(adapter),
        "ids": [ids.tolist() for ids, _ in pairs],
        "max_tokens": max_tokens,
        "ends": sorted(engine.model.ends),
    }
    named = json.dumps({**job, "sha256": sha256_file(adapter / WEIGHTS)})
    out = cache / f"torch-{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"
    if not out.is_file():
        _run(job, out)
    return [detokenize(engine.model, ids) for ids in json.loads(out.read_text())]


def _run(job: dict[str, object], out: Path) -> None:
    request = out.with_suffix(".job.json")
    write_text(request, json.dumps(job))
    try:
        torch_child("loramix.eval.torch_child", request, out)
    finally:
        request.unlink()
