"""Whether a request for one skill is answered better in the skill's own words than in those of the user.

    python benchmarks/canonical_words.py PACK --data DATA --rows 40 --out canonical.jsonl

Rows of dev in phrasings that no adapter was trained on (those of the gate), the skill named, greedy: each is answered
as it stands, and asked again in the pack's instruction for the skill around the same text. Resumes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import click

from loramix import Engine
from loramix.eval.skills import score
from loramix.prompts import fill
from loramix.train.data import Row, read_rows, take
from loramix.train.gate_data import load_phrasings
from loramix.train.recipe import load_recipe

KINDS = ("as asked", "canonical")


@click.command()
@click.argument("pack")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Directory of NAME.jsonl.gz.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Answers, JSONL.")
@click.option("--rows", default=40, show_default=True, help="Rows a skill.")
def main(pack: str, data: Path, out: Path, rows: int) -> None:
    """Print each skill's first measure for both ways of asking."""
    phrasings = load_phrasings()
    known: dict[tuple[str, str, int], str] = {}
    if out.is_file():
        for line in out.read_text(encoding="utf-8").splitlines():
            kind, skill, i, text = json.loads(line)
            known[kind, skill, i] = text
    total: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with out.open("a", encoding="utf-8") as file, Engine.open(pack) as engine:
        for skill in engine.pack.skills:
            recipe = load_recipe(skill.name)
            chosen = take(
                [r for r in read_rows(data / f"{skill.name}.jsonl.gz") if len(r.input) < 900], "dev", rows
            )
            lists = phrasings.skills[skill.name]
            asked = [_asked(row, lists, i) for i, row in enumerate(chosen)]
            for i, (row, prompt) in enumerate(zip(chosen, asked, strict=True)):
                own = fill(skill.instruction or "{input}", row.input)
                for kind, text in zip(KINDS, (prompt, own), strict=True):
                    if (kind, skill.name, i) not in known:
                        answer = known[kind, skill.name, i] = engine.generate(text, mix=skill.name).text
                        file.write(json.dumps([kind, skill.name, i, answer], ensure_ascii=False) + "\n")
                        file.flush()
            for kind in KINDS:
                found = score(recipe, [known[kind, skill.name, i] for i in range(len(chosen))], chosen)
                first = found[recipe.metrics[0]]
                total[kind].append(first["value"])
                click.echo(
                    f"{skill.name}: {kind}: {recipe.metrics[0]} {first['value']:.3f} "
                    f"({first['low']:.3f}-{first['high']:.3f}), {len(chosen)} rows"
                )
    for kind in KINDS:
        click.echo(f"mean: {kind}: {sum(total[kind]) / len(total[kind]):.3f}")


def _asked(row: Row, lists: Mapping[str, list[str]], number: int) -> str:
    """A row in one of its phrasings: those of its source if there are any."""
    among = lists.get(row.source) or [text for texts in lists.values() for text in texts]
    return fill(random.Random(f"canonical-{number}").choice(among), row.input)


if __name__ == "__main__":
    main()
