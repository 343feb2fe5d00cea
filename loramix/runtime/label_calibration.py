"""``python -m loramix.runtime.label_calibration BASE ADAPTER < JOB.json``: fits a skill's calibration temperature.

The temperature minimizes the mean negative log-likelihood of the right labels (Guo et al. 2017). It divides the
logits at each branch of the labels' trie, see `loramix.runtime.labels`. Training calls this in a process of its own,
because torch and llama.cpp bring two OpenMP runtimes and must not share one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loramix.defaults import N_CTX
from loramix.errors import REFUSED, LoramixError
from loramix.models.mixing import Mix
from loramix.models.softmax import log_softmax
from loramix.prompts import as_messages
from loramix.runtime.decoder import Decoder, DecodeRequest
from loramix.runtime.labels import LabelTrie

LOWEST, HIGHEST = 0.1, 10.0
"""Bounds of the fitted temperature."""


class Branch(NamedTuple):
    """One branch on the way to a right label."""

    logits: npt.NDArray[np.float32]
    """(K,) of the tokens that continue a label, before calibration."""
    right: int
    """Index of the right one."""


def branches_of(decoder: Decoder, trie: LabelTrie, mix: Mix, prompt: list[int], label: str) -> list[Branch]:
    """Compute the logits at all branches on the way to a label.

    Args:
        decoder: decodes the prompt.
        trie: the labels, with temperature 1.
        mix: the mix that answers.
        prompt: token ids.
        label: the right label.
    """
    tokens = next(path for path, text in trie.labels.items() if text == label)
    found = []
    for i in range(len(tokens)):
        path = tokens[:i]
        if path in trie.branches:
            logits = decoder.decode(DecodeRequest(mix, [*prompt, *path], len(prompt))).logits
            found.append(Branch(trie.calibrated(path, logits), trie.branches[path].index(tokens[i])))
    return found


def loss(rows: Sequence[Sequence[Branch]], temperature: float) -> float:
    """Mean negative log-likelihood of the right labels in nats.

    Args:
        rows: branches of each row.
        temperature: divides all logits.
    """
    values = [log_softmax(b.logits / np.float32(temperature))[b.right] for branches in rows for b in branches]
    return -math.fsum(map(float, values)) / max(1, len(rows))


def fit_temperature(rows: Sequence[Sequence[Branch]]) -> float:
    """Fit a temperature by golden-section search; the loss is convex in its inverse.

    Args:
        rows: branches of each row; not empty.

    Returns:
        The temperature, from `LOWEST` to `HIGHEST`.
    """
    low, high, ratio = 1 / HIGHEST, 1 / LOWEST, (math.sqrt(5) - 1) / 2
    while high - low > 1e-4 * high:
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        if loss(rows, 1 / first) <= loss(rows, 1 / second):
            high = second
        else:
            low = first
    return 2 / (low + high)


def main(arguments: Sequence[str]) -> None:
    """Read ``{"labels", "rows": [{"prompt", "label"}], "sha256"}``; print ``{"temperature", "loss", "plain_loss"}``."""
    from loramix.formats.validate import check_adapter, read_base
    from loramix.hardware import default_threads
    from loramix.runtime.adapters import AdapterCache, AdapterFile
    from loramix.runtime.llama.model import Model
    from loramix.runtime.probe import verdict_for

    base, adapter = Path(arguments[0]), Path(arguments[1])
    job: Mapping[str, Any] = json.load(sys.stdin)
    _, shape = read_base(base)
    mix = Mix.of({"skill": 1.0})
    with Model(base, use_extra_bufts=verdict_for(base).use_extra_bufts) as model:
        cache = AdapterCache(model, quantized=shape.is_quantized)
        file = AdapterFile(
            adapter, job["sha256"], lambda data: check_adapter(data, shape, str(adapter)).invocation
        )
        cache.put("skill", file)
        n_ctx = min(N_CTX, model.n_ctx_train)
        decoder = Decoder(model, cache, n_ctx=n_ctx, n_threads=default_threads(), taps=(), contexts=2)
        trie = LabelTrie.of(model, job["labels"])
        rows = []
        try:
            for row in job["rows"]:
                prompt = model.chat(as_messages(row["prompt"]))
                if len(prompt) + trie.depth <= n_ctx:
                    rows.append(branches_of(decoder, trie, mix, prompt, row["label"]))
            if not rows:
                raise LoramixError("no dev row fits into the context; shorten the rows.")
        except LoramixError as error:
            print(error, file=sys.stderr)
            sys.exit(REFUSED)
        finally:
            cache.close()
    temperature = fit_temperature(rows)
    print(
        json.dumps(
            {"temperature": temperature, "loss": loss(rows, temperature), "plain_loss": loss(rows, 1.0)}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
