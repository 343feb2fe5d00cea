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
from loramix.defaults import BASE
from loramix.formats.validate import read_base
from loramix.models import bases
from loramix.models.gate import Gate
from loramix.models.gate_bank import Bank
from loramix.models.gate_numpy import GateInfo
from loramix.pack.edit import NewGate, set_gate
from loramix.pack.own import target_of
from loramix.paths import atomic_write
from loramix.runtime.children import compute
from loramix.train.gate_data import Prompt, collect
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
    per_skill: int | None = None,
    to: str = "",
) -> Iterator[str]:
    """Train a pack's gate and write it to the pack.

    Args:
        pack: name or directory; a read-only pack is copied first.
        data_dir: directory with a data file per skill.
        none_files: files of prompts that no skill fits.
        out: directory for features, the PyTorch gate and gate.npz.
        layers: layers to read; by default three, from three fifths of the depth to the last layer's input.
        pooling: see `loramix.runtime.features.pool`.
        search: compare the `candidates` and use the best.
        per_skill: prompts per skill, see `loramix.train.gate_data.collect`; fewer are faster but less accurate.
        to: see `loramix.pack.own.target_of`.

    Yields:
        Progress messages, one line each.
    """
    target = target_of(str(pack), to=to)
    found = target.pack
    if target.note:
        yield target.note
    base = bases.resolve(found.manifest.base.name)
    skills = [skill.name for skill in found.skills]
    prompts = collect(skills, data_dir, none_files, per_skill=per_skill)
    n_layer = read_base(base)[1].n_layer
    layers = layers or default_layers(n_layer)
    tapped = sorted({i for chosen, _ in candidates(n_layer) for i in chosen} if search else set(layers))
    yield f"{len(prompts)} prompts of {len({p.group for p in prompts})} phrasings; features of layers {tapped}"
    out.mkdir(parents=True, exist_ok=True)
    arrays = cached_features(out, base, prompts, tapped)

    targets, groups = targets_of(prompts, skills), groups_of(prompts)

    def info_of(chosen: tuple[int, ...], kind: str) -> GateInfo:
        return gate_info(skills, chosen, kind, found.manifest.base.sha256)

    if search:
        yield "| layers | pooling | accuracy | skill to base | none to base | calibration error |"
        yield "|---|---|---|---|---|---|"
        best = -1.0
        for chosen, kind in candidates(n_layer):
            _, s = train(select(arrays, chosen, kind), targets, groups, info_of(chosen, kind))
            yield (
                f"| {', '.join(map(str, chosen))} | {kind} | {s.accuracy:.4f} | {s.skill_to_base:.4f} "
                f"| {s.none_to_base:.4f} | {s.calibration_error:.4f} |"
            )
            if s.accuracy > best:
                best, layers, pooling = s.accuracy, chosen, kind
    gate, scores, difference = fitted(select(arrays, layers, pooling), prompts, info_of(layers, pooling), out)
    with target.changing() as directory:
        set_gate(directory, gate.gate, gate.features)
    yield f"layers {list(layers)}, {pooling}: {describe(scores)}, NumPy within {difference:.0e}"


def fitted(
    features: Floats, prompts: Sequence[Prompt], info: GateInfo, out: Path
) -> tuple[NewGate, Scores, float]:
    """Fit a gate and its feature bank.

    Args:
        features: (B, D) float32, as ``info`` says.
        prompts: B of them.
        info: what the gate reads and decides between.
        out: directory for the torch gate and gate.npz.

    Returns:
        The gate, how it decides on phrasings that it was not fitted on, and NumPy's largest difference to torch.
    """
    targets, groups = targets_of(prompts, info.skills), groups_of(prompts)
    gate, scores = train(features, targets, groups, info)
    content, difference = converted(gate, out)
    bank = Bank.of(features, targets, groups, [*info.skills, BASE])
    return NewGate(content, bank.to_bytes()), scores, difference


def gate_info(skills: Sequence[str], layers: Sequence[int], pooling: str, base_sha256: str) -> GateInfo:
    """Return the description of a new gate's inputs and classes, before calibration."""
    return GateInfo(
        skills=list(skills),
        threshold=0.5,
        layers=list(layers),
        pooling=pooling,
        base_sha256=base_sha256,
        hidden=HIDDEN,
        members=MEMBERS,
    )


def converted(gate: Gate, out: Path) -> tuple[bytes, float]:
    """Save a trained gate and convert it.

    Args:
        gate: trained and calibrated.
        out: directory for the torch gate and gate.npz.

    Returns:
        Content of gate.npz, and its largest difference to torch.
    """
    gate.save(out)
    difference = convert_gate(out, out / "gate.npz")
    return (out / "gate.npz").read_bytes(), difference


def describe(scores: Scores) -> str:
    """Format the scores for a message."""
    return (
        f"{scores.accuracy:.1%} right on unseen phrasings, {scores.none_to_base:.1%} of none to the base, "
        f"{scores.skill_to_base:.1%} of skill prompts lost, calibration error {scores.calibration_error:.3f}"
    )


def cached_features(
    out: Path, base: Path, prompts: Sequence[Prompt], layers: Sequence[int]
) -> dict[str, npt.NDArray[np.float16]]:
    """Compute features of prompts; those of known texts are read from a cache.

    Args:
        out: directory of the cache, one file per base and set of layers.
        base: GGUF file of the base.
        prompts: prompts.
        layers: layers to read.

    Returns:
        ``last:LAYER`` and ``mean:LAYER``, (B, D) float16 each.
    """
    name = hashlib.sha256(f"{bases.digest(base)} {sorted(layers)}".encode()).hexdigest()[:16]
    path = out / f"features-{name}.npz"
    arrays: dict[str, npt.NDArray[np.float16]] = {}
    keys: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
    if path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            keys = archive["keys"]
            arrays = {key: archive[key] for key in archive.files if key != "keys"}
    wanted = [_key(prompt.text) for prompt in prompts]
    known = set(keys.tolist())
    new = {key: prompt.text for key, prompt in zip(wanted, prompts, strict=True) if key not in known}
    if new:
        fresh = compute(base, list(new.values()), sorted(layers))
        arrays = {key: np.concatenate([arrays[key], fresh[key]]) if arrays else fresh[key] for key in fresh}
        keys = np.concatenate([keys, np.asarray(list(new), np.uint64)])
        with atomic_write(path) as file:
            np.savez(file, keys=keys, **arrays)  # type: ignore[arg-type]
    place = {key: i for i, key in enumerate(keys.tolist())}
    rows = [place[key] for key in wanted]
    return {key: array[rows] for key, array in arrays.items()}


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "little")
