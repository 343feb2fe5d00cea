"""``python -m loramix.eval.torch_child JOB.json OUT.json``: greedy answers of an adapter in PyTorch, float32.

Does not import llama.cpp, since a process loads only one of the two libraries.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from loramix.paths import write_text

BATCH = 16


def main(arguments: Sequence[str]) -> None:
    """Read ``{"base", "adapter", "ids", "max_tokens", "ends"}``; write the answers' token ids without the end."""
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


if __name__ == "__main__":
    main(sys.argv[1:])
