"""Cost of adding a skill: `skill add translate_de` on a copy of the pack, with the gate update timed.

    python benchmarks/add_skill.py --data DATA --out RUN

Trains the adapter (resumable), then measures the update without the training, the other skills' accuracy on held-out
prompts before and after, the reload in a running engine, and the removal.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from evaluate import HERE, save

from loramix import DEFAULT, Engine
from loramix.commands.train import Display
from loramix.defaults import BASE
from loramix.eval import routing
from loramix.eval.skills import score
from loramix.models import bases
from loramix.pack.edit import remove_skill
from loramix.pack.own import target_of
from loramix.pack.pack import Pack
from loramix.prompts import fill
from loramix.train import skill as work
from loramix.train.data import data_file, read_rows, take
from loramix.train.default_recipe import recipe_of_data
from loramix.train.lora import train_skill
from loramix.train.recipe import recipe_beside

NAME = "translate_de"
RECIPE = HERE / f"{NAME}.toml"
HELD_OUT = (
    "Please provide a German translation of this: {input}",
    "{input}\n\n^ this, but German",
    "Write it as a native of Vienna would: {input}",
    "TRANSLATE (target language: German)\n{input}",
    "Ins Deutsche, bitte: {input}",
    "Was bedeutet {input}",
    "I am localizing a program. The English string is below; give me the German one.\n{input}",
    "How would a German put this? {input}",
    "Convert from English to German:\n{input}",
    "german?? {input}",
    "Our readers in Zurich should understand this too. {input}",
    "{input} (in German)",
)
"""Phrasings that are not in the recipe."""
PROMPT = "Translate to German: tool to view and edit network settings"


def chosen(pack: Pack, texts: Sequence[str]) -> list[str]:
    """Return the gate's decisions on prompts."""
    with Engine(pack) as engine:
        routes = [engine.route(text, policy="top1") for text in texts]
    return [next(iter(route.mix), BASE) for route in routes]


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--pack", default=DEFAULT, show_default=True)
@click.option(
    "--adapter",
    type=click.Path(exists=True, path_type=Path),
    help="Use this trained adapter instead of training one.",
)
@click.option("--max-rows", default=4000, show_default=True)
@click.option(
    "--per-template", default=3, show_default=True, help="Texts put into each phrasing of the others."
)
@click.option("--rows", default=100, show_default=True, help="Test rows that the new skill answers.")
def main(
    data: Path, out: Path, pack: str, adapter: Path | None, max_rows: int, per_template: int, rows: int
) -> None:
    """Run the benchmark and write the results to results.json."""
    source = Pack.load(pack)
    base = bases.resolve(source.manifest.base.name)
    everything = read_rows(data / "extra" / f"{NAME}.jsonl.gz")
    recipe = recipe_of_data(NAME, everything, RECIPE, source.manifest.base.name)
    if adapter is None:
        with Display() as display:
            train_skill(recipe, everything, base, out, resume=True, max_rows=max_rows, report=display.update)
        adapter = out / "adapter"
    known = [skill.name for skill in source.skills]
    recipes = {name: recipe_beside(data / "skills", name) for name in known}
    test = {n: take(read_rows(data_file(data / "skills", n)), "test") for n in known}
    sets = routing.questions(
        recipes, test, routing.read_held_out(HERE / "heldout.toml"), [], per_template=per_template
    )
    sets = {name: group for name, group in sets.items() if not name.startswith(routing.NONE)}
    old = [question for group in sets.values() for question in group]
    german = take(everything, "test", max(rows, 6 * len(HELD_OUT)))
    new = [
        fill(t, row.input)
        for t, row in zip(itertools.cycle(HELD_OUT), german[: 6 * len(HELD_OUT)], strict=False)
    ]
    asked = [*(q.text for q in old), *new]
    before = chosen(source, asked[: len(old)])
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(shutil.copytree(source.directory, Path(directory) / source.name))
        with Engine.open(copy) as engine:
            engine.generate(PROMPT, max_tokens=4)
            began = time.perf_counter()
            change = work.add(target_of(str(copy)), recipe, everything, out, adapter=adapter, say=click.echo)
            update = time.perf_counter() - began
            began = time.perf_counter()
            engine.reload()
            reload = time.perf_counter() - began
            answer = engine.generate(PROMPT)
            found = chosen(change.pack, asked)
            texts = [
                engine.generate(fill(HELD_OUT[0], row.input), mix=f"{NAME}=1").text for row in german[:rows]
            ]
        began = time.perf_counter()
        removed = remove_skill(copy, NAME).pack
        removal = time.perf_counter() - began
        after = chosen(removed, asked[: len(old)])
    wanted = [question.wanted for question in old]

    def right(choices: list[str]) -> float:
        return float(np.mean([choice == want for choice, want in zip(choices, wanted, strict=True)]))

    save(
        "skill add",
        {
            "update_s": round(update, 1),
            "reload_s": round(reload, 3),
            "remove_s": round(removal, 1),
            "others_before": right(before),
            "others_after": right(found[: len(old)]),
            "others_after_removal": right(after),
            "new_skill_routed": float(np.mean([choice == NAME for choice in found[len(old) :]])),
            "new_skill": score(recipe, texts, german[:rows]),
            "example": {"prompt": PROMPT, "mix": answer.route.mix, "answer": answer.text},
            "prompts": len(old),
        },
    )


if __name__ == "__main__":
    main()
