"""Sequences that decode together get the bits that each gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny import write_base, write_peft

from loramix.convert.adapter import convert_adapter
from loramix.models.fuse import fuse
from loramix.models.mixing import Mix
from loramix.runtime.llama.batch_context import BatchContext
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model, quantize_rows


def test_a_row_beside_others_is_the_row_alone_on_a_quantized_base(tmp_path: Path) -> None:
    """Floats go through other kernels for one row than for several; whole 8-bit blocks do not."""
    base = write_base(tmp_path / "q8.gguf", kind="Q8_0")
    peft = write_peft(tmp_path / "peft", modules=("q_proj", "o_proj", "up_proj", "down_proj"), r=12)
    convert_adapter(peft, base, tmp_path / "a.gguf")
    content = fuse([((tmp_path / "a.gguf").read_bytes(), 1.0)], quantize=quantize_rows)
    mix, prompts = Mix.parse("a"), [list(range(3 + i, 23 + 2 * i)) for i in range(7)]
    with Model(base) as model:
        adapters = [(model.load_adapter(content, "a"), 1.0)]
        contexts = []
        for prompt in prompts:
            contexts.append(Context(model, adapters, n_ctx=256, n_threads=2))
            contexts[-1].decode(prompt)
        together = BatchContext(model, n_seq=7, n_cells=1024, n_threads=2)
        together.set_mix(mix, adapters)
        ids = [together.add(context, mix) for context in contexts]
        for step in range(4):
            found = together.decode({sequence: 40 + step + i for i, sequence in enumerate(ids)})
            for i, (sequence, context) in enumerate(zip(ids, contexts, strict=True)):
                np.testing.assert_array_equal(found[sequence], context.decode([40 + step + i]))
