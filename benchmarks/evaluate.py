"""What the default pack reaches, one command a measure; each writes into benchmarks/results.json.

    python benchmarks/evaluate.py sentiment --data DATA     accuracy on all test rows, routed
    python benchmarks/evaluate.py summarize --data DATA     ROUGE-L on all test rows, routed
    python benchmarks/evaluate.py routing   --data DATA     phrasings that training never saw, and neither skill
    python benchmarks/evaluate.py parity    --peft RUNS     adapters and their mix against PyTorch
    python benchmarks/evaluate.py runtime                   memory, gate time, first token
    python benchmarks/evaluate.py report                    docs/results.md from results.json

DATA is a directory with skills/NAME.jsonl.gz and routing/*.jsonl; RUNS holds sentiment/adapter and so on.
"""

from __future__ import annotations

import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np

from loramix.models import bases
from loramix.paths import write_text
from loramix.prompts import fill
from loramix.runtime.cpu import machine
from loramix.train.data import Row, read_rows
from loramix.train.gate_data import read_none
from loramix.train.metrics import Estimate, bootstrap, estimate, measure, share
from loramix.train.recipe import load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
DATA = click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
ROWS = click.option("--rows", default=0, help="Rows at most; 0 takes all.")
PROMPTS = {
    "sentiment": "Is this review positive or negative?\n{input}",
    "oneline": "Describe this package in one line:\n{input}",
    "tldr": "Summarize this paper in one sentence.\n\n{input}",
}


def save(name: str, value: dict[str, Any]) -> None:
    """Put one measure into results.json and print it."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[name] = {**value, "command": "python benchmarks/evaluate.py " + " ".join(_arguments())}
    known["machine"] = machine()
    write_text(RESULTS, json.dumps(known, indent=1, sort_keys=True) + "\n")
    click.echo(json.dumps({name: value}, indent=1))


def _arguments() -> list[str]:
    hidden = {"--data": "DATA", "--peft": "RUNS"}
    words = sys.argv[1:]
    return [hidden.get(words[i - 1], word) if i else word for i, word in enumerate(words)]


def held_out() -> dict[str, dict[str, list[str]]]:
    """Phrasings that no training reads."""
    return tomllib.loads((HERE / "heldout.toml").read_text())


@click.group()
def main() -> None:
    """Measure the default pack."""


def answer_rows(rows: list[Row], templates: list[str], metric: str, **options: Any) -> tuple[Estimate, float]:
    """Score of the answers, and the share of rows whose mix was one skill alone."""
    from loramix import Engine

    answers, routed = [], 0
    with Engine.open() as engine:
        for i, row in enumerate(rows):
            answer = engine.generate(fill(templates[i % len(templates)], row.input), **options)
            text = answer.text
            if options.get("policy") == "base" and metric == "accuracy":  # the base talks: look for the label
                found = [label for label in ("positive", "negative") if label in text.lower()]
                text = found[0] if len(found) == 1 else text
            answers.append(text)
            routed += len(answer.route.mix) == 1
    return estimate(measure(metric), answers, rows), routed / len(rows)


def interval(found: Estimate) -> dict[str, float]:
    low, high = round(found.low, 4), round(found.high, 4)
    return {"mean": round(found.value, 4), "low": low, "high": high, "rows": found.rows}


@main.command()
@DATA
@ROWS
def sentiment(data: Path, rows: int) -> None:
    """Accuracy, routed, in one fixed phrasing and in unseen ones; the bare base beside it."""
    everything = read_rows(data / "skills" / "sentiment.jsonl.gz")
    test = [row for row in everything if row.split == "test"][: rows or None]
    amazon = [row for row in everything if row.split == "test_uci_amazon"][: rows or None]
    fixed, unseen = [PROMPTS["sentiment"]], held_out()["sentiment"]["templates"]
    result: dict[str, Any] = {}
    for name, chosen, templates, options in (
        ("routed", test, fixed, {}),
        ("routed, unseen phrasings", test, unseen, {}),
        ("routed, test_uci_amazon", amazon, fixed, {}),
        ("bare base", test, fixed, {"policy": "base", "max_tokens": 12}),
    ):
        scores, share = answer_rows(chosen, templates, "accuracy", **options)
        result[name] = {**interval(scores), "routed_to_one_skill": round(share, 4)}
    save("sentiment", result)


@main.command()
@DATA
@ROWS
@click.option("--base-rows", default=100, show_default=True, help="Rows for the bare base, which talks long.")
def summarize(data: Path, rows: int, base_rows: int) -> None:
    """ROUGE-L, routed; the lead sentence and the bare base beside it."""
    everything = [row for row in read_rows(data / "skills" / "summarize.jsonl.gz") if row.split == "test"]
    result: dict[str, Any] = {}
    for source in ("oneline", "tldr"):
        test = [row for row in everything if row.source == source][: rows or None]
        scores, share = answer_rows(test, [PROMPTS[source]], "rouge_l")
        result[f"{source}, routed"] = {**interval(scores), "routed_to_one_skill": round(share, 4)}
        lead = [row.input.split(". ")[0].split("\n")[0] for row in test]
        result[f"{source}, lead sentence"] = interval(estimate(measure("rouge_l"), lead, test))
        scores, _ = answer_rows(test[:base_rows], [PROMPTS[source]], "rouge_l", policy="base", max_tokens=64)
        result[f"{source}, bare base"] = interval(scores)
    save("summarize", result)


@main.command()
@DATA
@click.option("--per-template", default=3, show_default=True, help="Test texts put into each phrasing.")
def routing(data: Path, per_template: int) -> None:
    """Decisions of the gate on phrasings, texts and requests that training never saw."""
    from loramix import Engine

    held = held_out()
    with Engine.open() as engine:
        skills = [skill.name for skill in engine.pack.skills]
    texts = {
        skill: [row for row in read_rows(data / "skills" / f"{skill}.jsonl.gz") if row.split == "test"]
        for skill in skills
    }
    general = [skill for skill in skills if load_recipe(skill).any_text]
    rng = np.random.default_rng(0)

    def ask(templates: list[str], among: list[str], wanted: str) -> list[tuple[str, str]]:
        rows = [row for skill in among for row in texts[skill]]
        picks = rng.integers(0, len(rows), (len(templates), per_template))
        return [
            (fill(t, rows[i].input), wanted) for t, row in zip(templates, picks, strict=True) for i in row
        ]

    sets: dict[str, list[tuple[str, str]]] = {}
    for kind, wording in (("templates", ""), ("plain", ", no telling words")):
        for skill in skills:
            sets[skill + wording] = ask(held[skill][kind], [skill], skill)
        for skill in general:
            others = [name for name in general if name != skill]
            sets[f"{skill}{wording}, on other skills' texts"] = ask(held[skill][kind], others, skill)
    none_files = {"CLINC150 out of scope": "clinc_out_of_scope", "Self-Instruct": "self_instruct_seed_tasks"}
    for name, file in none_files.items():
        found = read_none(data / "routing" / f"{file}.jsonl")
        unseen = [text for i, (split, text) in enumerate(found) if (split == "test" if split else i % 2)]
        sets[f"none: {name}"] = [(text, "base") for text in unseen]
    sets["none: everyday prompts and near misses"] = [(text, "base") for text in held["none"]["prompts"]]
    sets["none: other requests about texts"] = ask(held["none"]["templates"], skills, "base")
    result: dict[str, Any] = {}
    errors: list[list[str]] = []
    with Engine.open() as engine:
        for name, prompts in sets.items():
            hits = []
            for text, wanted in prompts:
                mix = engine.route(text).mix
                found = next(iter(mix), "base")
                hits.append(float(found == wanted and len(mix) <= 1))
                if found != wanted:
                    errors.append([name, found, text[:160]])
            result[name] = interval(bootstrap(np.asarray([[hit, 1] for hit in hits]), share))
    write_text(HERE / "routing_errors.json", json.dumps(errors, indent=1, ensure_ascii=False) + "\n")
    save("routing", result)


@main.command()
@click.option("--peft", type=click.Path(exists=True, path_type=Path), required=True)
def parity(peft: Path) -> None:
    """Adapters and their mix against PyTorch, on a float32 copy of the base and on the base itself."""
    from loramix.convert.adapter import convert_adapter
    from loramix.convert.base import requantize
    from loramix.convert.selfcheck import parity as compare

    base = bases.resolve(bases.DEFAULT)
    skills = ("sentiment", "summarize")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        wide = Path(directory) / "float32.gguf"
        requantize(base, wide, {"": "F32"})
        for place, path in (("float32 base", wide), ("default base", base)):
            files = {}
            for skill in skills:
                files[skill] = Path(directory) / f"{skill}.gguf"
                outtype = "f32" if path is wide else "f16"
                convert_adapter(peft / skill / "adapter", base, files[skill], outtype=outtype)
            mixes = [((skill, 1.0),) for skill in skills] + [(("sentiment", 0.7), ("summarize", 0.3))]
            for mix in mixes:
                found = compare(path, [(files[s], peft / s / "adapter", scale) for s, scale in mix])
                label = " + ".join(f"{scale:g} {skill}" for skill, scale in mix)
                result[f"{place}: {label}"] = {
                    "max_difference": found.max_difference,
                    "mean_kl": found.mean_kl,
                    "same_argmax": found.same_argmax,
                }
    save("parity", result)


@main.command()
def runtime() -> None:
    """Memory with the pack loaded, the gate's time, and time to the first token of a fresh process."""
    from loramix import Engine

    with Engine.open() as engine:
        for prompt in ("Is this review positive or negative? I liked it.", "Summarize: a long day.", "hello"):
            engine.generate(prompt, max_tokens=16)
        gate = engine.router.gate
        assert gate is not None
        features = np.random.default_rng(0).normal(size=gate.n_features).astype(np.float32)
        times = []
        for _ in range(2000):
            began = time.perf_counter()
            engine.router.decide(features, "top1")
            times.append(time.perf_counter() - began)
    first = []
    for _ in range(5):
        command = [
            sys.executable,
            "-m",
            "loramix",
            "run",
            "-n",
            "1",
            "Is this review positive or negative? I liked it.",
        ]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        first.append(time.perf_counter() - began)
    save(
        "runtime",
        {
            "resident_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "gate_p50_ms": round(1000 * statistics.median(times), 3),
            "gate_p99_ms": round(1000 * float(np.quantile(times, 0.99)), 3),
            "run_first_token_s": round(statistics.median(first), 2),
        },
    )


@main.command()
def report() -> None:
    """Write docs/results.md, and the README's table."""
    known = json.loads(RESULTS.read_text())
    lines = ["# Results of the default pack", "", f"Machine: {known['machine']}.", ""]
    for name in ("sentiment", "summarize", "routing"):
        if name in known:
            lines += [f"## {name}", "", f"`{known[name]['command']}`", ""]
            lines += ["| measure | value | 95 % interval | rows |", "|---|---|---|---|"]
            for what, value in known[name].items():
                if what != "command":
                    span = f"{value['low']:.3f}–{value['high']:.3f}"
                    lines.append(f"| {what} | {value['mean']:.3f} | {span} | {value['rows']} |")
            lines.append("")
    if "parity" in known:
        lines += ["## parity", "", f"`{known['parity']['command']}`", ""]
        lines += ["| base and mix | largest logit difference | mean KL | same argmax |", "|---|---|---|---|"]
        for what, value in known["parity"].items():
            if what != "command":
                figures = (
                    f"{value['max_difference']:.2g} | {value['mean_kl']:.2g} | {value['same_argmax']:.1%}"
                )
                lines.append(f"| {what} | {figures} |")
        lines.append("")
    if "runtime" in known:
        lines += [
            "## runtime",
            "",
            f"`{known['runtime']['command']}`",
            "",
            "| measure | value |",
            "|---|---|",
        ]
        lines += [f"| {what} | {value} |" for what, value in known["runtime"].items() if what != "command"]
        lines.append("")
    write_text(HERE.parent / "docs" / "results.md", "\n".join(lines))
    readme = HERE.parent / "README.md"
    block = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)
    text = readme.read_text(encoding="utf-8")
    write_text(readme, block.sub(lambda match: match[1] + _short(known) + match[2], text))


def _short(known: dict[str, Any]) -> str:
    """The README's table."""

    def row(what: str, section: str, key: str, beside: str = "") -> str:
        value = known[section][key]
        return f"| {what} | {value['mean']:.3f} ({value['low']:.3f}–{value['high']:.3f}) | {beside} |"

    def of(section: str, key: str) -> str:
        return f"{known[section][key]['mean']:.3f}"

    base, lead = "bare base", "lead sentence"
    parity = {k: v for k, v in known["parity"].items() if k != "command"}
    exact = max(v["max_difference"] for k, v in parity.items() if k.startswith("float32"))
    kl = max(v["mean_kl"] for k, v in parity.items() if k.startswith("default"))
    run = known["runtime"]
    rows = [
        f"Measured on {known['machine']}; all figures with their commands are in [docs/results.md](docs/results.md).",
        "",
        "| measure (routed by the gate; 95 % interval) | value | beside it |",
        "|---|---|---|",
        row(
            "sentiment, accuracy, 523 film reviews", "sentiment", "routed", f"{base} {of('sentiment', base)}"
        ),
        row("the same, asked in phrasings unseen in training", "sentiment", "routed, unseen phrasings"),
        row("sentiment, Amazon reviews (another kind of text)", "sentiment", "routed, test_uci_amazon"),
    ]
    for source, what in (("oneline", "package descriptions"), ("tldr", "scientific abstracts")):
        beside = (
            f"{lead} {of('summarize', f'{source}, {lead}')}, {base} {of('summarize', f'{source}, {base}')}"
        )
        rows.append(row(f"summarize, ROUGE-L, {what}", "summarize", f"{source}, routed", beside))
    for skill in ("sentiment", "summarize"):
        rows.append(row(f"routing, unseen phrasings of {skill}", "routing", skill))
        rows.append(
            row("the same, on the other skill's texts", "routing", f"{skill}, on other skills' texts")
        )
    for name in ("CLINC150 out of scope", "Self-Instruct", "everyday prompts and near misses"):
        rows.append(row(f"routing, no skill fits: {name}", "routing", f"none: {name}"))
    rows += [
        f"| llama.cpp against PyTorch, float32 base: largest logit difference | {exact:.1g} | |",
        f"| the same on the default base: mean KL | {kl:.2g} | |",
        f"| gate's decision after its features, p50 / p99 | {run['gate_p50_ms']} / {run['gate_p99_ms']} ms | |",
        f"| resident memory with the pack loaded | {run['resident_memory_mb']} MB | |",
        f"| `loramix run`, first token of a fresh process | {run['run_first_token_s']} s | |",
        "",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
