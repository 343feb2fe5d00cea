"""Types for a mix of adapters on a base of mixed types: speed, size, difference from float32.

    python benchmarks/mix_types.py --base FILE --adapter A.gguf --adapter B.gguf --out types.json [--rounds 9]

One adapter, and a blend of two, in float32, float16 and Q8_0 (with ranks padded to 32), against the bare base;
times are compared as in `speed.paired`. The difference is the mean KL divergence from the float32 mix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from speed import fused, mixes, report

from loramix.convert.selfcheck import PROBES, logits_of, mean_kl
from loramix.formats.validate import check_adapter, read_adapter_bytes, read_base
from loramix.hardware import default_threads, machine
from loramix.models.fuse import fuse, read_pairs, write_lora


def in_float16(content: bytes, architecture: str) -> bytes:
    """Convert the matrices of a fused GGUF LoRA to float16."""
    pairs = read_pairs(content)
    (_, _, scaling), *_ = pairs.values()
    rank = next(iter(pairs.values())).a.shape[0]
    tensors = {
        f"{target}.lora_{half}": np.asarray(values, np.float16)
        for target, (a, b, _) in pairs.items()
        for half, values in (("a", a), ("b", b))
    }
    return write_lora(architecture, scaling * rank, tensors)


@click.command()
@click.option("--base", type=click.Path(path_type=Path), required=True, help="A GGUF.")
@click.option("--adapter", "adapters", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(base: Path, adapters: tuple[Path, ...], rounds: int, out: Path) -> None:
    """Run the benchmark and write JSON."""
    _, shape = read_base(base)
    contents = [read_adapter_bytes(path) for path in adapters[:2]]
    for content, path in zip(contents, adapters, strict=False):
        check_adapter(content, shape, str(path))
    variants: dict[str, bytes] = {}
    for name, parts in (("one", [(contents[0], 1.0)]), ("two", [(content, 0.5) for content in contents])):
        exact = fuse([*parts, (parts[0][0], 0.0)] if len(parts) == 1 else parts)
        variants[f"{name}, float32"] = exact
        variants[f"{name}, float16"] = in_float16(exact, shape.architecture.name)
        variants[f"{name}, Q8_0"] = fused(parts)
    found: dict[str, Any] = {
        "machine": machine(),
        "base": base.name,
        "bytes": {n: len(c) for n, c in variants.items()},
    }
    found |= mixes(base, variants, default_threads(), rounds)
    logits = {name: logits_of(base, shape, [(content, 1.0)], PROBES)[0] for name, content in variants.items()}
    found["kl"] = {
        name: mean_kl(logits[f"{name.split(',')[0]}, float32"], rows) for name, rows in logits.items()
    }
    report(out, found)


if __name__ == "__main__":
    main()
