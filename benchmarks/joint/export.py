"""Writes the results of ``train`` as GGUF LoRAs of a pack: A in Q8_0, B in float16; needs Loramix, no GPU.

    python -m benchmarks.joint.export RUN --base smollm2-135m --out ADAPTERS [--slot NAME]

Next to each NAME.gguf it writes NAME.json, the record of the training: settings, figures, steps, device.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from loramix.convert.adapter import write_adapter
from loramix.formats.validate import BaseShape, read_base
from loramix.models import bases
from loramix.models.known_bases import BASES
from loramix.paths import write_text

from . import JointError
from .results import load

BLOCK = 32  # values of a row that share a scale in Q8_0
ALPHA_PER_RANK = 2.0  # model.SCALING, which is not imported because it needs PyTorch
PATH = click.Path(path_type=Path)


def export(run: Path, name: str, shape: BaseShape, base_name: str, base_sha256: str, out: Path) -> None:
    """Write one slot's adapter and record.

    Args:
        run: directory of the results.
        name: name of the slot.
        shape: shape of the base.
        base_name: the base's name for the metadata.
        base_sha256: the base's SHA-256.
        out: directory to write.

    Raises:
        JointError: there is no complete result, or it is of another base.
        InvalidArtifact, WrongBase: see `write_adapter`.
    """
    found = load(run, name)
    if found is None:
        raise JointError(f"{run} has no complete result of slot {name!r}; run joint.train again.")
    arrays, record = found
    if record["run"]["base_sha256"] != base_sha256:
        raise JointError(f"slot {name!r} was trained on another base; give that one with --base.")
    tensors = {key: array.astype(np.float32) for key, array in arrays.items()}
    types = {
        key: "Q8_0" if key.endswith(".lora_a") and array.shape[1] % BLOCK == 0 else "F16"
        for key, array in tensors.items()
    }
    write_adapter(
        out / f"{name}.gguf",
        tensors,
        ALPHA_PER_RANK * record["slot"]["rank"],
        shape,
        types=types,
        name=record["slot"]["skill"],
        base_name=base_name,
        base_sha256=base_sha256,
    )
    write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", required=True, help="Name or GGUF of the base.")
@click.option("--out", type=PATH, required=True, help="Directory to write.")
@click.option("--slot", "slots", multiple=True, help="Only this slot; repeatable.  [default: all]")
def main(run: Path, base: str, out: Path, slots: tuple[str, ...]) -> None:
    """Write the adapters of RUN, finished or not, and say which."""
    path = bases.resolve(base)
    _, shape = read_base(path)
    named, digest = base if base in BASES else path.name, bases.digest(path)
    for name in slots or sorted(file.name.removesuffix(".0.npz") for file in run.glob("*.0.npz")):
        export(run, name, shape, named, digest, out)
        record = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        dev = min(check["loss"] for check in record["checks"])
        state = "finished" if record["finished"] else "not finished"
        click.echo(
            f"{out / name}.gguf: {state}, dev loss {dev:.4f} at step {record['best_step']} of {record['steps']}"
        )


if __name__ == "__main__":
    main()
