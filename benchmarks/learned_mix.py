"""One learned combination of two skills' adapters for prompts that ask for both, against answers step by step.

    python benchmarks/learned_mix.py rows  --data DATA/skills --out RUN [--rows 200]
    python benchmarks/learned_mix.py train --out RUN [--per layer|matrix] [--passes 3]
    python benchmarks/learned_mix.py score --data DATA/skills --out RUN [--limit 20]

``rows`` makes answers for training: two requests by hand on rows of ``train``, gold where there is one, in the
training's phrasings. ``train`` learns one factor for each adapter and layer (or matrix), with adapters and base frozen
(LoRA Soups, arXiv 2410.13025). ``score`` compares the learned combination with the uniform blend, the default policy
and two requests, on the held-out phrasings, and writes benchmarks/results.json.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from evaluate import HERE, save

from loramix import DEFAULT, Engine
from loramix.eval.answers import AnswerStore
from loramix.eval.composed import Bench, answers_of, scores
from loramix.eval.composed_cases import Case, Kind, cases, kinds_of
from loramix.eval.routing import read_held_out
from loramix.formats.validate import read_base
from loramix.models import bases
from loramix.models.fuse import Part, fuse
from loramix.pack.edit import add_skill
from loramix.pack.own import copy_pack
from loramix.pack.pack import Pack
from loramix.paths import write_text
from loramix.train.data import Row, data_file, read_rows
from loramix.train.gate_data import load_phrasings
from loramix.train.recipe import Recipe, load_recipe

PACK = click.option("--pack", default=DEFAULT, show_default=True)
OUT = click.option("--out", type=click.Path(path_type=Path), required=True)
DATA = click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
BATCH, RATE = 4, 0.03


def held_out() -> dict[str, list[str]]:
    """The held-out phrasings by the skills' names joined with ``+``."""
    return read_held_out(HERE / "heldout.toml")["composed"]


def kinds() -> list[Kind]:
    """The kinds of the composed test set."""
    names = sorted({name for names in held_out() for name in names.split("+")})
    return list(kinds_of(held_out(), names))


def file_of(kind: Kind, out: Path, what: str) -> Path:
    """A file of the run for a kind of prompts."""
    return out / f"{kind.first}+{kind.second}.{what}"


def loaded(data: Path) -> tuple[dict[str, Recipe], dict[str, list[Row]]]:
    """Recipes and rows of all skills that the kinds need."""
    names = sorted({name for kind in kinds() for name in (kind.first, kind.second)})
    return {n: load_recipe(n) for n in names}, {n: read_rows(data_file(data, n)) for n in names}


@click.group()
def main() -> None:
    """Measure a learned combination of two adapters."""


@main.command()
@PACK
@DATA
@OUT
@click.option("--rows", "count", default=200, show_default=True)
def rows(pack: str, data: Path, out: Path, count: int) -> None:
    """Make composed answers for training."""
    recipes, known = loaded(data)
    trained = load_phrasings().composed
    with Engine.open(pack) as engine:
        bench = Bench(engine, AnswerStore(out / "answers.jsonl"), recipes, lambda: None)
        for kind in kinds():
            names = {frozenset(key.split("+")): key for key in trained}
            templates = trained[names[frozenset((kind.first, kind.second))]]
            lines = []
            for case in cases(kind, templates, recipes, known, "train", count):
                given = {skill: row.target for skill, row in case.wanted.items() if row is not None}
                first = given.get(kind.first) or bench.pinned(kind.first, case.text)
                about = first if kind.chain else case.text
                second = given.get(kind.second) or bench.pinned(kind.second, about)
                answer = second if kind.chain else f"{first}\n{second}"
                lines.append(json.dumps({"prompt": case.prompt, "answer": answer}, ensure_ascii=False))
            write_text(file_of(kind, out, "jsonl"), "\n".join(lines) + "\n")
            click.echo(f"{kind.name}: {len(lines)} rows")


@main.command()
@PACK
@OUT
@click.option("--per", type=click.Choice(["layer", "matrix"]), default="layer", show_default=True)
@click.option("--passes", default=3, show_default=True)
def train(pack: str, out: Path, per: str, passes: int) -> None:
    """Learn the factors of each kind."""
    found = Pack.load(pack)
    base = bases.resolve(found.manifest.base.name)
    for kind in kinds():
        target = file_of(kind, out, f"{per}.json")
        if target.is_file():
            continue
        factors, first, last = learn(found, base, kind, file_of(kind, out, "jsonl"), per, passes)
        write_text(target, json.dumps(factors))
        click.echo(f"{kind.name}: loss {first:.3f} before, {last:.3f} after, {len(factors)} factors")


def learn(
    pack: Pack, base: Path, kind: Kind, file: Path, per: str, passes: int
) -> tuple[dict[str, list[float]], float, float]:
    """Learn the factors of two adapters; ``{base tensor: [first's, second's]}`` and the loss before and after."""
    import torch
    from torch.nn import functional as F

    from loramix.convert.base_model import autocast_dtype, load_base
    from loramix.convert.peft import export_peft, module_names
    from loramix.convert.peft_reader import read_peft
    from loramix.train.examples import token_ids
    from loramix.train.forward import collate, hidden_states

    shape = read_base(base)[1]
    dtype = autocast_dtype()
    model = load_base(base, dtype)
    read = [json.loads(line) for line in file.read_text().splitlines()]
    examples = [e for e in token_ids(base, [(r["prompt"], r["answer"]) for r in read]) if len(e.ids) <= 640]
    tensors = {module: tensor for tensor, module in module_names(shape).items()}
    pairs: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for i, name in enumerate((kind.first, kind.second)):
        with tempfile.TemporaryDirectory() as temporary:
            export_peft(pack.adapter_bytes(name), shape, Path(temporary) / "peft", name)
            adapter = read_peft(Path(temporary) / "peft")
        for module, (a, b) in adapter.pairs.items():
            scaled = torch.from_numpy(b * np.float32(adapter.scaling[module]))
            pairs.setdefault(module, []).append((i, torch.from_numpy(a).to(dtype), scaled.to(dtype)))
    groups = {
        module: tensors[module] if per == "matrix" else module_layer(tensors[module]) for module in pairs
    }
    learned = {group: torch.full((2,), 0.5, requires_grad=True) for group in sorted(set(groups.values()))}

    def with_adapters(module: str) -> Callable[..., Any]:
        def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            for i, a, b in pairs[module]:
                output = output + learned[groups[module]][i].to(dtype) * F.linear(
                    F.linear(inputs[0].to(dtype), a), b
                )
            return output

        return hook

    modules = dict(model.named_modules())
    for module in pairs:
        name = next(n for n in modules if n == module or n.endswith(f".{module}"))
        modules[name].register_forward_hook(with_adapters(module))
    optimizer = torch.optim.Adam(learned.values(), lr=RATE)
    rng = random.Random(0)
    losses = []
    for _ in range(passes):
        order = rng.sample(examples, len(examples))
        for at in range(0, len(order) - BATCH + 1, BATCH):
            ids, mask, chosen = collate(order[at : at + BATCH])
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                states = hidden_states(model.model, ids, mask, 0)[:, :-1][chosen]
                logits = model.lm_head(states)
            loss = F.cross_entropy(logits.float(), ids[:, 1:][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    part = max(1, len(losses) // (2 * passes))
    factors = {tensors[module]: learned[group].tolist() for module, group in groups.items()}
    return factors, float(np.mean(losses[:part])), float(np.mean(losses[-part:]))


def module_layer(tensor: str) -> str:
    """``blk.3`` of ``blk.3.attn_q.weight``."""
    return ".".join(tensor.split(".")[:2])


def combined(pack: Pack, kind: Kind, factors: Mapping[str, Sequence[float]]) -> bytes:
    """Both adapters as one GGUF LoRA, each matrix scaled by its factor."""
    parts = []
    for i, name in enumerate((kind.first, kind.second)):
        part = Part.read(pack.adapter_bytes(name))
        halves = {
            tensor: half._replace(scaling=half.scaling * factors[tensor][i])
            for tensor, half in part.halves.items()
        }
        parts.append((replace(part, halves=halves), 1.0))
    return fuse(parts)


@main.command()
@PACK
@DATA
@OUT
@click.option("--limit", default=20, show_default=True, help="Prompts of a kind.")
def score(pack: str, data: Path, out: Path, limit: int) -> None:
    """Compare learned combinations with the other ways to answer."""
    recipes, known = loaded(data)
    found = Pack.load(pack)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "learned"
        copy_pack(found, directory)
        for number, kind in enumerate(kinds()):
            for per in ("layer", "matrix"):
                if (file := file_of(kind, out, f"{per}.json")).is_file():
                    adapter = combined(found, kind, json.loads(file.read_text()))
                    add_skill(directory, f"{per}{number}", adapter, description="Two skills.", max_tokens=160)
        table: dict[str, dict[str, float]] = {}
        store = AnswerStore(out / "answers.jsonl")
        with Engine.open(pack) as routed:
            bench = Bench(routed, store, recipes, lambda: None)
            for kind in kinds():
                table[kind.name] = compared(bench, kind, cases_of(kind, recipes, known, limit))
        with Engine.open(directory) as engine:
            bench = Bench(engine, store, recipes, lambda: None)
            skills = {skill.name for skill in engine.pack.skills}
            for number, kind in enumerate(kinds()):
                for per in ("layer", "matrix"):
                    if (name := f"{per}{number}") in skills:
                        chosen = cases_of(kind, recipes, known, limit)
                        table[kind.name][f"learned per {per}"] = pinned(bench, kind, chosen, name)
    save("learned_mix", {"limit": limit, "pack": found.name, "kinds": table})


def cases_of(
    kind: Kind, recipes: Mapping[str, Recipe], known: Mapping[str, Sequence[Row]], limit: int
) -> list[Case]:
    """The test prompts of a kind."""
    templates = next(found for one, found in kinds_of(held_out(), list(recipes)).items() if one == kind)
    return cases(kind, templates, recipes, known, "test", limit)


def compared(bench: Bench, kind: Kind, chosen: Sequence[Case]) -> dict[str, float]:
    """Mean of both parts' scores for the blend, the default policy and two requests."""
    ways = answers_of(bench, kind, {})
    return {
        name: mean_of(bench, kind, chosen, ways[name]) for name in ("top1", "uniform", "plan", "sequence")
    }


def pinned(bench: Bench, kind: Kind, chosen: Sequence[Case], name: str) -> float:
    """Mean of both parts' scores where one adapter answers."""
    limit = bench.limit(kind)
    return mean_of(bench, kind, chosen, lambda case: bench.mixed(case.prompt, {name: 1.0}, limit))


def mean_of(bench: Bench, kind: Kind, chosen: Sequence[Case], answer: Callable[[Case], str]) -> float:
    """Mean of both parts' scores."""
    return round(float(np.mean(list(scores(bench, kind, chosen, answer).values()))), 4)


if __name__ == "__main__":
    main()
