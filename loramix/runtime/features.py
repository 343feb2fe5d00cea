"""The gate's features: hidden states of the bare base at the end of the prompt.

``python -m loramix.runtime.features BASE OUT.npz 15,29 [--share] < PROMPTS.jsonl`` writes them for training, so
that training and serving use the same numbers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.defaults import N_CTX
from loramix.errors import Unsupported
from loramix.paths import atomic_write
from loramix.runtime.llama.context import Context

POOLINGS = ("last", "mean", "last+mean")


def pool(context: Context, layers: Sequence[int], pooling: str) -> npt.NDArray[np.float32]:
    """Compute the features of the prompt in a context.

    Args:
        context: a tapped context of the bare base that ends with the answer's header.
        layers: tapped layers, concatenated in this order.
        pooling: ``last`` token, ``mean`` over all tokens but the first (an outlier in norm), or ``last+mean``.

    Returns:
        (D x layers,) float32, twice that for ``last+mean``.

    Raises:
        Unsupported: another pooling.
    """
    if pooling not in POOLINGS:
        raise Unsupported(f"the gate asks for pooling {pooling!r}; this version knows {', '.join(POOLINGS)}.")
    blocks: list[npt.NDArray[np.float32]] = []
    for layer in layers:
        states = context.states(layer)
        if "last" in pooling:
            blocks.append(states[-1])
        if "mean" in pooling:
            blocks.append(states[1:].mean(axis=0))
    return np.concatenate(blocks)


def main(arguments: Sequence[str]) -> None:
    """Read ``{"prompt"}`` lines; write float16 arrays ``last:LAYER`` and ``mean:LAYER``, (prompts, D).

    With ``--share``, common prefixes are prefilled once.
    """
    from loramix.hardware import default_threads
    from loramix.prompts import as_messages
    from loramix.runtime.kv_cache import common_prefix, reuse
    from loramix.runtime.llama.model import Model
    from loramix.runtime.probe import verdict_for

    base, out = Path(arguments[0]), Path(arguments[1])
    layers = [int(text) for text in arguments[2].split(",")]
    rows: dict[str, list[npt.NDArray[np.float16]]] = {
        f"{p}:{i}": [] for i in layers for p in ("last", "mean")
    }
    with Model(base, use_extra_bufts=verdict_for(base).use_extra_bufts) as model:
        context = Context(model, n_ctx=N_CTX, n_threads=default_threads(), taps=layers)
        prompts = [model.chat(as_messages(json.loads(line)["prompt"]))[-N_CTX:] for line in sys.stdin]
        order, share = list(range(len(prompts))), "--share" in arguments
        if share:
            order.sort(
                key=lambda i: prompts[i]
            )  # sorted prompts share the longest prefixes with their neighbours
        for number, i in enumerate(order, 1):
            ids = prompts[i]
            if share:
                held = min(common_prefix(context.tokens, ids), len(ids) - 1)
                context.truncate(held)
            else:
                held = reuse(context, ids)
            context.decode(ids[held:])
            for layer in layers:
                for pooling in ("last", "mean"):
                    rows[f"{pooling}:{layer}"].append(pool(context, [layer], pooling).astype(np.float16))
            if number % 100 == 0:
                print(number, file=sys.stderr, flush=True)
    with atomic_write(out) as file:
        back = np.argsort(order)
        np.savez(file, **{key: np.stack(value)[back] for key, value in rows.items()})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
