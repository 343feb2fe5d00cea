"""Trains the adapters of a configuration together on a GPU, next to nothing but PyTorch, NumPy, gguf and click.

    python -m benchmarks.joint.train --base BASE.gguf --data PREPARED --config slots.toml --out RUN

Each slot's result is written when it is finished; the same command again trains the slots that are not.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import click
import torch

from . import JointError, results
from .model import Base
from .rows import SkillRows, read_skill, training_sequences
from .slots import Layout, Slot, read_slots, settings
from .training import Run, SlotTraining

PATH = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def pending(slots: list[Slot], out: Path, identities: dict[str, dict[str, Any]]) -> list[Slot]:
    """Return the slots without a finished result.

    Raises:
        JointError: a result has other settings.
    """
    found = []
    for slot in slots:
        known = results.load(out, slot.name)
        if known and known[1]["run"] != identities[slot.name]:
            raise JointError(f"{out} has slot {slot.name!r} with other settings or data; give another --out.")
        if not (known and known[1]["finished"]):
            found.append(slot)
    return found


def check_rows(slot: Slot, skill: SkillRows, base_sha256: str, limit: int) -> None:
    """Check that prepared rows are usable for a slot.

    Raises:
        JointError: rows for another base, too few passes, or rows longer than a sequence.
    """
    if skill.base_sha256 != base_sha256:
        raise JointError(f"the rows of {slot.skill!r} are for another base; prepare them for this one.")
    if max(slot.passes) >= len(skill.passes):
        raise JointError(
            f"slot {slot.name!r} needs pass {max(slot.passes)}, {slot.skill!r} has passes 0 to "
            f"{len(skill.passes) - 1}; prepare more."
        )
    every = (*skill.passes, skill.dev, *([skill.test] if skill.test else []))
    if (longest := max(length for rows in every for length in rows.lengths)) > limit:
        raise JointError(f"a row of {slot.skill!r} has {longest} tokens; set --length to at least that.")


def share_of_steps(run: Run, trainings: list[SlotTraining], seconds: float | None) -> float:
    """Return the share of the planned steps that fits in a time; 1.0 if all do or there is no limit."""
    if seconds is None:
        return 1.0
    needed = run.seconds_per_step(trainings) * sum(one.steps for one in trainings) / len(trainings)
    return min(1.0, seconds / needed)


@click.command()
@click.option("--base", type=FILE, required=True, help="GGUF of the base.")
@click.option("--data", type=PATH, required=True, help="Directory of prepared rows.")
@click.option("--config", type=FILE, required=True, help="TOML with the slots.")
@click.option("--out", type=PATH, required=True, help="Directory of the results.")
@click.option("--length", default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--sequences", default=3, show_default=True, help="Sequences of each slot in a step.")
@click.option("--skip-lowest", default=0.34, show_default=True, help="Share of the layers without adapters.")
@click.option("--seed", default=1, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seconds", type=float, help="Shorten all slots by one factor to about this training time.")
@click.option("--max-steps", type=int, help="Most steps of a slot.")
@click.option("--deadline", type=float, help="Stop after this many seconds in all, and write what there is.")
def main(
    base: Path,
    data: Path,
    config: Path,
    out: Path,
    length: int,
    sequences: int,
    skip_lowest: float,
    seed: int,
    dtype: str,
    seconds: float | None,
    max_steps: int | None,
    deadline: float | None,
) -> None:
    """Train the slots that have no finished result."""
    began = time.monotonic()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f}] {line}")

    slots = read_slots(config)
    skills = {name: read_skill(data / f"{name}.npz") for name in {slot.skill for slot in slots}}
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    common = {"base_sha256": digest, "length": length, "sequences": sequences, "seed": seed, "dtype": dtype}
    common |= {"skip_lowest": skip_lowest}
    identities = {
        slot.name: {**common, **settings(slot), "data_sha256": skills[slot.skill].digest} for slot in slots
    }
    for slot in slots:
        check_rows(slot, skills[slot.skill], digest, length)
    todo = pending(slots, out, identities)
    say(f"{len(todo)} of {len(slots)} slots to train")
    if not todo:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = Base(base, device, getattr(torch, dtype))
    layout = Layout(frozen.shape, todo, int(skip_lowest * frozen.shape.n_layer))
    run = Run(frozen, layout, out, length, sequences, say)
    trainings = []
    for slot in todo:
        packed = training_sequences(skills[slot.skill], slot.passes, length, seed)
        steps = min(math.ceil(len(packed) / sequences), max_steps or len(packed))
        flat = torch.nn.Parameter(layout.start(slot, seed).to(device))
        trainings.append(SlotTraining(slot, skills[slot.skill], packed, steps, flat, identities[slot.name]))
    share = share_of_steps(run, trainings, seconds)
    for one in trainings:
        one.record["planned_steps"] = one.steps
        one.steps = one.record["steps"] = max(1, int(one.steps * share))
        say(
            f"{one.slot.name}: {len(one.sequences)} sequences, {one.steps} of {one.record['planned_steps']} steps"
        )
    run.train(trainings, math.inf if deadline is None else began + deadline)
    if device.type == "cuda":
        say(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory")


if __name__ == "__main__":
    main()
