"""``python -m loramix.eval.torch_answers JOB.json OUT.json``: greedy answers of an adapter in PyTorch.

What the adapter says before conversion, in float32; in a process of its own, since torch and llama.cpp must
not share one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from loramix.convert.reference import torch_child
from loramix.errors import InvalidArtifact
from loramix.paths import sha256_file, write_text
from loramix.runtime.detokenize import detokenize
from loramix.runtime.engine import Engine
from loramix.runtime.tokenize import tokenize_rows

BATCH = 16
WEIGHTS = "adapter_model.safetensors"


def main(arguments: Sequence[str]) -> None:
    """Read ``{"base", "adapter", "ids", "max_tokens", "ends"}``; write the answers' token ids, without the end."""
    import torch
    from peft import PeftModel

    from loramix.convert.base_model import load_base, quiet

    job = json.loads(Path(arguments[0]).read_text())
    model = load_base(Path(job["base"]))
    with quiet():
        model = PeftModel.from_pretrained(model, job["adapter"])
    prompts, ends = job["ids"], job["ends"]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        width = max(len(prompts[i]) for i in rows)
        padded = [[ends[0]] * (width - len(prompts[i])) + prompts[i] for i in rows]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows]
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=job["max_tokens"],
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
        for i, found in zip(rows, out[:, width:].tolist(), strict=True):
            answers[i] = list(takewhile(lambda token: token not in ends, found))
    write_text(Path(arguments[1]), json.dumps(answers))


def torch_answers(
    engine: Engine, adapter: Path, prompts: Sequence[str], max_tokens: int, cache: Path
) -> list[str]:
    """Greedy answers of a PEFT adapter on the engine's base.

    Args:
        engine: gives the base and the vocabulary.
        adapter: PEFT directory.
        prompts: asked each alone.
        max_tokens: longest answer.
        cache: directory where answers are kept.

    Raises:
        InvalidArtifact: the directory holds no adapter.
        MissingExtra: torch, transformers or peft is not installed.
        SelfCheckFailed: PyTorch failed.
    """
    if not (adapter / WEIGHTS).is_file():
        raise InvalidArtifact(f"no {WEIGHTS} in {adapter}; name the run directories that training wrote.")
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
        torch_child("loramix.eval.torch_answers", request, out)
    finally:
        request.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
