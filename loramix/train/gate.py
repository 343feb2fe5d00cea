"""Train a pack's gate: requests → states that the runtime computes → a small transformer over them, calibrated.

Temperature, threshold and, in a search, the layers are chosen on wordings held out of the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loramix.errors import UsageError
from loramix.formats.validate import read_base
from loramix.models import bases
from loramix.models.early_head import EarlyHead
from loramix.pack.edit import set_gate
from loramix.pack.own import target_of
from loramix.pack.pack import Pack
from loramix.train.gate_collect import collect_from
from loramix.train.gate_run import Run
from loramix.train.head_fit import FitSettings

CONTINUED = FitSettings(passes=4, rate=8e-4, tag_weight=2.0, dropout=0.15, dropped=0.05)
"""How a gate is trained further: with more weight on the tags, which need more steps than the classes."""
DEV = 0.2
"""Requests per skill to choose on, for each that is trained on."""


def default_layer(n_layer: int) -> int:
    """The layer whose input is read: 13 % of the depth, where accuracy rises no more (docs/gate.md)."""
    return max(1, round(0.135 * n_layer))


def candidates(n_layer: int) -> list[tuple[int, ...]]:
    """Layers that a search compares, from the embeddings to a third of the depth."""
    deepest = max(1, n_layer // 3)
    steps = sorted({0, max(1, default_layer(n_layer) // 2), default_layer(n_layer), deepest})
    return [*((layer,) for layer in steps), (0, default_layer(n_layer))]


def train_gate(
    pack: str | Path,
    data_dir: Path,
    none_files: Sequence[Path],
    out: Path,
    *,
    search: bool = False,
    further: bool = False,
    per_skill: int | None = None,
    to: str = "",
    seed: int = 0,
) -> Iterator[str]:
    """Train a pack's gate and write it to the pack; a run that was interrupted goes on where it was.

    Args:
        pack: name or directory; a read-only pack is copied first.
        data_dir: directory with a data file per skill.
        none_files: files of requests in people's own words, see `loramix.train.gate_collect.read_requests`.
        out: directory for states and checkpoints, which are deleted at the end.
        search: compare the `candidates` and use the best.
        further: begin with the pack's gate, see `CONTINUED`.
        per_skill: requests made for each skill, see `loramix.train.gate_collect.collect_requests`; fewer are
            faster but less accurate.
        to: see `loramix.pack.own.target_of`.
        seed: of the head's first weights and all draws of the training.

    Yields:
        Progress messages, one line each.

    Raises:
        UsageError: the pack has no skills, or no gate that can be trained further, or a search is to begin with one.
    """
    target = target_of(str(pack), to=to)
    found = target.pack
    if target.note:
        yield target.note
    if not found.skills:
        raise UsageError(
            f"pack {found.name!r} has no skills, and a gate chooses among skills; add one with 'loramix skill add'."
        )
    start = _start_of(found) if further else None
    if start and search:
        raise UsageError("--search compares new gates and cannot be used with --continue; give one of them.")
    base = bases.resolve(found.manifest.base.name)
    shape = read_base(base)[1]
    skills = [skill.name for skill in found.skills]
    count = per_skill or default_count(len(skills))
    requests = collect_from(skills, data_dir, none_files, per_skill=count)
    dev = collect_from(skills, data_dir, none_files, per_skill=max(5, round(DEV * count)), dev=True)
    compared = candidates(shape.n_layer) if search else [(default_layer(shape.n_layer),)]
    if start:
        compared = [tuple(start.info.layers)]
    settings = replace(CONTINUED if further else FitSettings(), seed=seed)
    run = Run(base, shape, skills, found.manifest.base.sha256, out, settings, start)
    data = yield from run.read(requests, dev, sorted({layer for layers in compared for layer in layers}))
    layers = compared[0]
    if search:
        layers = yield from run.search(data, compared)
    gate, scores = yield from run.gate(data, layers)
    with target.changing() as directory:
        set_gate(directory, gate.gate, gate.features)
    shutil.rmtree(out / "states", ignore_errors=True)
    yield f"layers {list(layers)}: {scores}"


def _start_of(pack: Pack) -> EarlyHead:
    """The pack's gate, to begin with.

    Raises:
        UsageError: it has none of the current format.
    """
    gate = pack.gate()
    if not isinstance(gate, EarlyHead):
        raise UsageError("the pack has no gate of the current format; train without --continue.")
    return gate


def default_count(n_skills: int) -> int:
    """Requests made for each skill: 700 for twelve, fewer where few have to be told apart."""
    return min(700, 300 + 35 * n_skills)
