"""Train a pack's gate: features that the runtime computed → components → an MLP, calibrated.

Everything that is chosen (layer, pooling, temperature, threshold) is chosen on phrasings held out of the
fit, by cross-validation over phrasings; the gate that ships is then fitted on all prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.convert.gate import convert_gate
from loramix.convert.validate import read_base
from loramix.models import bases
from loramix.models.gate_numpy import GateInfo
from loramix.pack import Pack
from loramix.pack_edit import NewGate, set_gate
from loramix.paths import atomic_write
from loramix.runtime.features import compute
from loramix.train.gate_bank import Bank
from loramix.train.gate_data import BASE, Prompt, collect
from loramix.train.gate_fit import Scores, train

Floats = npt.NDArray[np.float32]
HIDDEN = [128]
MEMBERS = 3


def targets_of(prompts: Sequence[Prompt], skills: Sequence[str]) -> Floats:
    """Target probabilities (B, K+1) float32; the last column is the base."""
    names = [*skills, BASE]
    return np.asarray([[prompt.target.get(name, 0.0) for name in names] for prompt in prompts], np.float32)


def groups_of(prompts: Sequence[Prompt]) -> npt.NDArray[np.int32]:
    """A number a phrasing, (B,) int32."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(prompt.group for prompt in prompts))}
    return np.asarray([numbers[prompt.group] for prompt in prompts], np.int32)


def select(arrays: dict[str, npt.NDArray[np.float16]], layers: Sequence[int], pooling: str) -> Floats:
    """Features as `loramix.runtime.features.pool` lays them out, (B, D) float32."""
    kinds = [kind for kind in ("last", "mean") if kind in pooling]
    blocks = [arrays[f"{kind}:{layer}"] for layer in layers for kind in kinds]
    return np.concatenate(blocks, axis=1).astype(np.float32)


def candidates(n_layer: int) -> list[tuple[tuple[int, ...], str]]:
    """(layers, pooling) that a search compares: from a fifth of the depth to the last layer's input."""
    depths = sorted({max(1, round(n_layer * share)) for share in (0.2, 0.4, 0.6, 0.8)} | {n_layer - 1})
    single = [((depth,), pooling) for pooling in ("mean", "last") for depth in depths]
    last, deep = depths[-1], depths[-2]
    return [*single, ((last,), "last+mean"), ((deep, last), "last"), (default_layers(n_layer), "last")]


def default_layers(n_layer: int) -> tuple[int, ...]:
    """What the search found best: three fifths and four fifths of the depth, and the last layer's input."""
    return tuple(sorted({max(1, round(0.6 * n_layer)), max(1, round(0.8 * n_layer)), n_layer - 1}))


def train_gate(
    pack: str | Path,
    data_dir: Path,
    none_files: Sequence[Path],
    out: Path,
    *,
    layers: tuple[int, ...] | None = None,
    pooling: str = "last",
    search: bool = False,
) -> Iterator[str]:
    """Train a pack's gate and put it into the pack.

    Args:
        pack: name or directory.
        data_dir: a data file per skill.
        none_files: prompts that no skill fits.
        out: directory for features, the torch gate and gate.npz.
        layers: layers to read; by default three, from three fifths of the depth to the last layer's input.
        pooling: see `loramix.runtime.features.pool`.
        search: compare the `candidates` and take the best.

    Yields:
        Lines that tell how it goes.
    """
    found = Pack.load(pack)
    base = bases.resolve(found.manifest.base.name)
    skills = [skill.name for skill in found.skills]
    prompts = collect(skills, data_dir, none_files)
    n_layer = read_base(base)[1].n_layer
    layers = layers or default_layers(n_layer)
    tapped = sorted({i for chosen, _ in candidates(n_layer) for i in chosen} if search else set(layers))
    yield f"{len(prompts)} prompts of {len({p.group for p in prompts})} phrasings; features of layers {tapped}"
    out.mkdir(parents=True, exist_ok=True)
    arrays = cached_features(out, base, prompts, tapped)

    def bank_of(chosen: tuple[int, ...], kind: str) -> Bank:
        targets, groups = targets_of(prompts, skills), groups_of(prompts)
        return Bank.of(select(arrays, chosen, kind), targets, groups, [*skills, BASE])

    def info_of(chosen: tuple[int, ...], kind: str) -> GateInfo:
        return gate_info(skills, chosen, kind, found.manifest.base.sha256)

    if search:
        yield "| layers | pooling | accuracy | skill to base | none to base | calibration error |"
        yield "|---|---|---|---|---|---|"
        best = -1.0
        for chosen, kind in candidates(n_layer):
            _, s = train(bank_of(chosen, kind), info_of(chosen, kind))
            yield (
                f"| {', '.join(map(str, chosen))} | {kind} | {s.accuracy:.4f} | {s.skill_to_base:.4f} "
                f"| {s.none_to_base:.4f} | {s.calibration_error:.4f} |"
            )
            if s.accuracy > best:
                best, layers, pooling = s.accuracy, chosen, kind
    bank = bank_of(layers, pooling)
    new, scores, difference = make_gate(bank, info_of(layers, pooling), out)
    set_gate(found.directory, new.gate, new.features)
    yield f"layers {list(layers)}, {pooling}: {describe(scores)}, NumPy within {difference:.0e}"


def gate_info(skills: Sequence[str], layers: Sequence[int], pooling: str, base_sha256: str) -> GateInfo:
    """What a gate of ours reads and decides between, before calibration."""
    return GateInfo(
        skills=list(skills),
        threshold=0.5,
        layers=list(layers),
        pooling=pooling,
        base_sha256=base_sha256,
        hidden=HIDDEN,
        members=MEMBERS,
    )


def make_gate(bank: Bank, info: GateInfo, out: Path) -> tuple[NewGate, Scores, float]:
    """Train a gate on a bank, and convert it.

    Args:
        bank: prompts as components.
        info: see `gate_info`.
        out: directory for the torch gate and gate.npz.

    Returns:
        What a pack takes, how it did on unseen phrasings, and its largest difference to torch.
    """
    gate, scores = train(bank, info)
    gate.save(out)
    difference = convert_gate(out, out / "gate.npz")
    return NewGate((out / "gate.npz").read_bytes(), bank.to_bytes()), scores, difference


def describe(scores: Scores) -> str:
    """Scores in words."""
    return (
        f"{scores.accuracy:.1%} right on unseen phrasings, {scores.none_to_base:.1%} of none to the base, "
        f"{scores.skill_to_base:.1%} of skill prompts lost, calibration error {scores.calibration_error:.3f}"
    )


def cached_features(
    out: Path, base: Path, prompts: Sequence[Prompt], layers: Sequence[int]
) -> dict[str, npt.NDArray[np.float16]]:
    """Features of the prompts, kept in ``out`` so that a second run on the same prompts takes seconds."""
    texts = "\0".join(prompt.text for prompt in prompts)
    key = hashlib.sha256(f"{bases.digest(base)} {sorted(layers)} {texts}".encode()).hexdigest()[:16]
    path = out / f"features-{key}.npz"
    if not path.is_file():
        arrays = compute(base, [prompt.text for prompt in prompts], layers)
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
