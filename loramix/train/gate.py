"""Train the gate: features that the runtime computed → an MLP, calibrated, with a threshold for "none of these".

Everything that is chosen (layer, pooling, temperature, threshold) is chosen on phrasings held out of the
fit, by cross-validation over phrasings; the gate that ships is then fitted on all prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from loramix.convert.gate import convert_gate
from loramix.convert.validate import read_base
from loramix.models import bases
from loramix.models.gate import Gate
from loramix.models.gate_numpy import GateInfo
from loramix.models.mixing import decide
from loramix.pack import Pack
from loramix.pack_edit import set_gate
from loramix.runtime.features import compute
from loramix.train.gate_data import BASE, Prompt, collect

Floats = npt.NDArray[np.float32]
FOLDS = 5
HIDDEN = [128]
MEMBERS = 3
PASSES = 40
SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class Scores:
    """How a gate does on phrasings that its fit did not see."""

    accuracy: float
    """Share of prompts for one skill, or none, that are decided right, at the threshold."""
    skill_to_base: float
    """Share of skill prompts sent to the base."""
    none_to_base: float
    """Share of "none" prompts sent to the base."""
    calibration_error: float
    """Expected calibration error of the top class, 15 bins (Guo et al. 2017)."""


def targets_of(prompts: Sequence[Prompt], skills: Sequence[str]) -> Floats:
    """Target probabilities (B, K+1) float32; the last column is the base."""
    names = [*skills, BASE]
    return np.asarray([[prompt.target.get(name, 0.0) for name in names] for prompt in prompts], np.float32)


def fit(features: Floats, targets: Floats, info: GateInfo, *, seed: int = 0) -> Gate:
    """Fit an ensemble of MLPs.

    Args:
        features: (B, D) float32.
        targets: (B, K+1) float32, rows sum to 1.
        info: what the gate decides between, and its widths.
        seed: of weights and order.

    Returns:
        A gate with temperature 1.
    """
    torch.manual_seed(seed)
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    y = y * (1 - SMOOTHING) + SMOOTHING / y.shape[1]
    gate = Gate(info, x.mean(0), x.std(0).clamp_min(1e-3), seed=seed)
    balance = y.sum(0).clamp_min(1).reciprocal()
    weight = (y @ balance) / (y @ balance).mean()  # classes count alike, however many prompts each has
    optimizer = torch.optim.AdamW(gate.parameters(), lr=3e-3, weight_decay=0.05)
    size = 256
    steps = PASSES * (len(x) // size + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(PASSES):
        for rows in torch.randperm(len(x)).split(size):
            # noise of a tenth of a standard deviation: wording unseen in training lands beside what was seen
            noisy = x[rows] + 0.1 * gate.std * torch.randn_like(x[rows])
            logits = gate(noisy)  # (B, M, K+1)
            loss = -(F.log_softmax(logits, dim=-1) * y[rows][:, None]).sum(-1).mean(1)
            optimizer.zero_grad()
            (loss * weight[rows]).mean().backward()
            optimizer.step()
            schedule.step()
    gate.eval()
    return gate


def folds(prompts: Sequence[Prompt], count: int = FOLDS, seed: int = 0) -> npt.NDArray[np.int64]:
    """Fold of each prompt, (B,) int64; prompts of one phrasing fall into the same one."""
    groups = {group: i for i, group in enumerate(dict.fromkeys(prompt.group for prompt in prompts))}
    assigned = np.random.default_rng(seed).permutation(len(groups)) % count
    return np.asarray([assigned[groups[prompt.group]] for prompt in prompts], np.int64)


def held_out_logits(features: Floats, targets: Floats, fold: npt.NDArray[np.int64], info: GateInfo) -> Floats:
    """Logits (B, M, K+1) of each prompt from a gate that did not see its phrasing."""
    logits = np.zeros((len(features), info.members, targets.shape[1]), np.float32)
    for i in range(int(fold.max()) + 1):
        gate = fit(features[fold != i], targets[fold != i], info, seed=i)
        with torch.no_grad():
            logits[fold == i] = gate(torch.from_numpy(features[fold == i])).numpy()
    return logits


def temperature_of(logits: Floats, targets: Floats) -> float:
    """The temperature with the lowest loss on held-out prompts (Guo et al. 2017), from a grid."""
    grid = np.geomspace(0.3, 4.0, 60)
    losses = [-(targets * np.log(ensemble(logits, t) + 1e-9)).sum(1).mean() for t in grid]
    return float(grid[int(np.argmin(losses))])


def ensemble(logits: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """Probabilities (B, K+1), averaged over the members of (B, M, K+1) logits."""
    wide = logits.astype(np.float64) / temperature
    odds = np.exp(wide - wide.max(-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = (odds / odds.sum(-1, keepdims=True)).mean(1)
    return probabilities


def threshold_of(probabilities: npt.NDArray[np.float64], targets: Floats) -> float:
    """The threshold for "none of these" with the fewest wrong decisions, skills and none weighed alike."""
    grid = np.round(np.arange(0.2, 0.96, 0.01), 2)
    single = targets.max(1) == 1
    costs = []
    for value in grid:
        found = score(probabilities[single], targets[single], float(value))
        costs.append(found.skill_to_base + (1 - found.none_to_base))
    best = np.flatnonzero(np.asarray(costs) <= min(costs) + 1e-9)
    return float(grid[best[len(best) // 2]])


def score(probabilities: npt.NDArray[np.float64], targets: Floats, threshold: float) -> Scores:
    """Measure decisions on prompts of one skill or none.

    Args:
        probabilities: (B, K+1).
        targets: (B, K+1), one-hot.
        threshold: least probability that a skill needs.
    """
    right = targets.argmax(1)
    chosen = decide(probabilities, threshold=threshold)
    base = targets.shape[1] - 1
    none = right == base
    top, hit = probabilities.max(1), probabilities.argmax(1) == right
    bins = np.minimum((top * 15).astype(int), 14)
    error = sum(
        abs(hit[bins == i].mean() - top[bins == i].mean()) * (bins == i).mean() for i in set(bins.tolist())
    )
    return Scores(
        accuracy=float((chosen == right).mean()),
        skill_to_base=float((chosen[~none] == base).mean()) if (~none).any() else 0.0,
        none_to_base=float((chosen[none] == base).mean()) if none.any() else 1.0,
        calibration_error=float(error),
    )


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
    targets = targets_of(prompts, skills)
    fold = folds(prompts)
    n_layer = read_base(base)[1].n_layer
    layers = layers or default_layers(n_layer)
    tapped = sorted({i for chosen, _ in candidates(n_layer) for i in chosen} if search else set(layers))
    yield f"{len(prompts)} prompts of {len({p.group for p in prompts})} phrasings; features of layers {tapped}"
    out.mkdir(parents=True, exist_ok=True)
    arrays = cached_features(out, base, prompts, tapped)
    single = targets.max(1) == 1

    def info_of(chosen: tuple[int, ...], kind: str) -> GateInfo:
        return GateInfo(
            skills=skills,
            threshold=0.5,
            layers=list(chosen),
            pooling=kind,
            base_sha256=found.manifest.base.sha256,
            hidden=HIDDEN,
            members=MEMBERS,
        )

    def validate(chosen: tuple[int, ...], kind: str) -> tuple[float, float, Scores]:
        logits = held_out_logits(select(arrays, chosen, kind), targets, fold, info_of(chosen, kind))
        temperature = temperature_of(logits, targets)
        probabilities = ensemble(logits, temperature)
        threshold = threshold_of(probabilities, targets)
        return temperature, threshold, score(probabilities[single], targets[single], threshold)

    if search:
        yield "| layers | pooling | accuracy | skill to base | none to base | calibration error |"
        yield "|---|---|---|---|---|---|"
        best = -1.0
        for chosen, kind in candidates(n_layer):
            *_, s = validate(chosen, kind)
            yield (
                f"| {', '.join(map(str, chosen))} | {kind} | {s.accuracy:.4f} | {s.skill_to_base:.4f} "
                f"| {s.none_to_base:.4f} | {s.calibration_error:.4f} |"
            )
            if s.accuracy > best:
                best, layers, pooling = s.accuracy, chosen, kind
    temperature, threshold, scores = validate(layers, pooling)
    gate = fit(select(arrays, layers, pooling), targets, info_of(layers, pooling))
    metrics = {
        "held_out_accuracy": scores.accuracy,
        "held_out_skill_to_base": scores.skill_to_base,
        "held_out_none_to_base": scores.none_to_base,
        "held_out_calibration_error": scores.calibration_error,
        "prompts": float(len(prompts)),
    }
    gate.calibrate(gate_temperature=temperature, threshold=threshold, metrics=metrics)
    gate.save(out)
    difference = convert_gate(out, out / "gate.npz")
    set_gate(found.directory, (out / "gate.npz").read_bytes())
    yield (
        f"layers {list(layers)}, {pooling}: {scores.accuracy:.1%} right on unseen phrasings, "
        f"{scores.none_to_base:.1%} of none to the base, {scores.skill_to_base:.1%} of skill prompts lost; "
        f"threshold {threshold}, temperature {temperature:.2f}, NumPy within {difference:.0e}"
    )


def cached_features(
    out: Path, base: Path, prompts: Sequence[Prompt], layers: Sequence[int]
) -> dict[str, npt.NDArray[np.float16]]:
    """Features of the prompts, kept in ``out`` so that a second run on the same prompts takes seconds."""
    import hashlib

    from loramix.paths import atomic_write

    texts = "\0".join(prompt.text for prompt in prompts)
    key = hashlib.sha256(f"{bases.digest(base)} {sorted(layers)} {texts}".encode()).hexdigest()[:16]
    path = out / f"features-{key}.npz"
    if not path.is_file():
        arrays = compute(base, [prompt.text for prompt in prompts], layers)
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
