"""What ``loramix eval`` does not measure, and the pages made of all figures.

    python benchmarks/evaluate.py parity              every adapter and a mix against PyTorch
    python benchmarks/evaluate.py runtime             memory, gate time, first token
    python benchmarks/evaluate.py report REPORT.json  docs/results.md

``report`` takes what ``loramix eval`` wrote and keeps a copy in benchmarks/report.json; multitask.py and
add_skill.py put their figures into benchmarks/results.json, as ``parity`` and ``runtime`` do.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from speed import decisions

from loramix import DEFAULT, Engine
from loramix.eval.report import figure, read_report, to_markdown
from loramix.hardware import machine
from loramix.models import bases
from loramix.pack.pack import Pack
from loramix.paths import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
REPORT = HERE / "report.json"
EVAL = (
    "loramix eval smollm2-135m --data-dir DATA/skills --held-out benchmarks/heldout.toml "
    "--none DATA/routing/clinc_out_of_scope.jsonl --none DATA/routing/self_instruct_seed_tasks.jsonl"
)
PROMPT = "Is this review positive or negative? I liked it."
MIX = (("sentiment", 0.7), ("summarize", 0.3))


def save(name: str, value: dict[str, Any], command: str | None = None) -> None:
    """Put one measure into results.json, with the command (by default this one) and the machine, and print it."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known[name] = {**value, "command": command or _command(), "machine": machine()}
    write_text(RESULTS, json.dumps(known, indent=1, sort_keys=True) + "\n")
    click.echo(json.dumps({name: value}, indent=1))


def _command() -> str:
    hidden = {"--data": "DATA", "--out": "RUN", "--runs": "RUNS", "--shape": "FILE", "--llama-server": "FILE"}
    words = [hidden.get(sys.argv[i - 1], word) for i, word in enumerate(sys.argv)]
    return " ".join(["python", f"benchmarks/{Path(words[0]).name}", *words[1:]])


@click.group()
def main() -> None:
    """Measure the default pack."""


@main.command()
@click.option("--pack", default=DEFAULT, show_default=True)
@click.option("--skill", "anew", multiple=True, help="Measure this one alone; the others' figures stay.")
def parity(pack: str, anew: tuple[str, ...]) -> None:
    """The pack's adapters and a mix against PyTorch, on a float32 copy of the base and on the base itself."""
    from loramix.convert.adapter import convert_adapter
    from loramix.convert.peft import export_peft
    from loramix.convert.selfcheck import parity as compare
    from loramix.formats.requantize import requantize
    from loramix.formats.validate import read_base

    found = Pack.load(pack)
    base = bases.resolve(found.manifest.base.name)
    _, shape = read_base(base)
    names = [found.skill(name).name for name in anew] or [skill.name for skill in found.skills]
    mixes = [((name, 1.0),) for name in names] + [MIX] * (not anew)
    result: dict[str, Any] = json.loads(RESULTS.read_text())["parity"]["mixes"] if anew else {}
    with tempfile.TemporaryDirectory() as directory:
        peft, wide = Path(directory) / "peft", Path(directory) / "float32.gguf"
        for name in names:
            export_peft(found.adapter_bytes(name), shape, peft / name, name)
        requantize(base, wide, {"": "F32"})
        for place, path, outtype in (("float32 base", wide, "f32"), ("default base", base, "f16")):
            files = {name: Path(directory) / f"{name}-{outtype}.gguf" for name in names}
            for name, file in files.items():
                convert_adapter(peft / name, base, file, outtype=outtype)
            for mix in mixes:
                one = compare(path, [(files[name], peft / name, scale) for name, scale in mix])
                label = " + ".join(name if len(mix) == 1 else f"{scale:g} {name}" for name, scale in mix)
                result.setdefault(label, {})[place] = {
                    "max_difference": one.max_difference,
                    "mean_kl": one.mean_kl,
                    "same_argmax": one.same_argmax,
                }
                click.echo(f"{place}: {label}: {one}", err=True)
    # skills measured anew one by one make what the whole command gives
    save("parity", {"mixes": result}, command="python benchmarks/evaluate.py parity")


@main.command()
def runtime() -> None:
    """Memory with the pack loaded, the gate's time, and time to the first token of a fresh process."""
    with Engine.open() as engine:
        for prompt in (PROMPT, "Summarize: a long day.", "hello"):
            engine.generate(prompt, max_tokens=16)
        times = decisions(engine, "One, two, three. " * 60, 500)
    first = []
    for _ in range(5):
        command = [sys.executable, "-m", "loramix", "run", "-n", "1", PROMPT]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        first.append(time.perf_counter() - began)
    save(
        "runtime",
        {
            "resident_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "gate_p50_ms": round(statistics.median(times), 3),
            "gate_p99_ms": round(float(np.quantile(times, 0.99)), 3),
            "run_first_token_s": round(statistics.median(first), 2),
        },
    )


@main.command()
@click.argument("source", type=click.Path(path_type=Path), default=REPORT)
def report(source: Path) -> None:
    """Write docs/results.md."""
    found = read_report(source)
    found["routing"].pop("errors", None)  # they quote the data
    write_text(REPORT, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    known = json.loads(RESULTS.read_text())
    head, _, sections = to_markdown(found).partition("\n")[2].partition("\n## ")
    limits = "".join(f" --{name} {limit}" for name, limit in found["limits"].items() if limit)
    lines = [
        "# Results of the default pack",
        "",
        f"`{EVAL}{limits}`",
        head.rstrip(),
        "",
        *_short(found, known),
        "## " + sections.rstrip(),
        *_multitask(found, known),
        *_added(known.get("skill add")),
        *_parity(known.get("parity")),
        *_runtime(known.get("runtime")),
    ]
    write_text(HERE.parent / "docs" / "results.md", "\n".join(lines) + "\n")


def _section(title: str, section: Mapping[str, Any], *head: str) -> list[str]:
    return ["", f"## {title}", "", f"`{section['command']}`, on {section['machine']}.", "", *head]


def first_measures(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(skill, test set, first measure, all kinds) of each test set of a report."""
    for skill, parts in found["skills"].items():
        for name, part in parts.items():
            yield skill, name, next(iter(part["pinned"])), part


def _multitask(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    own = {
        skill: {name: part["pinned"] for name, part in parts.items()}
        for skill, parts in found["skills"].items()
    }
    for key in sorted(key for key in known if key.startswith("multitask of ")):
        rival, columns = known[key]["skills"], {"its own adapter": own}
        if alone := known.get(f"alone beside {key}"):
            columns["its own, on as few rows"] = alone["skills"]
        columns["one for these"] = rival
        heads = ["skill", "test set", "measure", *columns, "rows"]
        head = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        title = f"One adapter for {len(rival)} skills"
        lines += _section(title, known[key], known[key]["what"], "", *head)
        for skill, parts in rival.items():
            for name, measures in parts.items():
                for measure, value in measures.items():
                    cells = [
                        figure(column[skill][name][measure]) if skill in column else ""
                        for column in columns.values()
                    ]
                    lines.append(f"| {' | '.join([skill, name, measure, *cells, str(value['rows'])])} |")
    return lines


def _added(section: Mapping[str, Any] | None) -> list[str]:
    if section is None:
        return []
    new = "; ".join(f"{name} {figure(value)}" for name, value in section["new_skill"].items())
    rows = [
        ("gate update, conversion and checks, training left out", f"{section['update_s']} s"),
        ("a running engine takes it up", f"{section['reload_s']} s"),
        ("removal", f"{section['remove_s']} s"),
        (
            f"other skills decided right, {section['prompts']} prompts, before",
            f"{section['others_before']:.4f}",
        ),
        ("after", f"{section['others_after']:.4f}"),
        ("after the removal", f"{section['others_after_removal']:.4f}"),
        ("the new skill's held-out phrasings decided right", f"{section['new_skill_routed']:.3f}"),
        ("its answers, pinned", new),
    ]
    table = ["| measure | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return _section("A thirteenth skill, translate_de", section, *table)


def _parity(section: Mapping[str, Any] | None) -> list[str]:
    if section is None:
        return []
    lines = _section(
        "The same adapters in PyTorch",
        section,
        "Logits at all positions of three texts. On a float32 base nothing but the conversion can differ;",
        "on the default base llama.cpp rounds activations too.",
        "",
        "| mix | float32 base: largest difference | default base: largest difference | mean KL | same choice |",
        "|---|---|---|---|---|",
    )
    for label, places in section["mixes"].items():
        exact, real = places["float32 base"], places["default base"]
        lines.append(
            f"| {label} | {exact['max_difference']:.2g} | {real['max_difference']:.2g} | "
            f"{real['mean_kl']:.2g} | {real['same_argmax']:.1%} |"
        )
    return lines


def _runtime(section: Mapping[str, Any] | None) -> list[str]:
    if section is None:
        return []
    names = {
        "resident_memory_mb": "resident memory with the pack in use, MB",
        "gate_p50_ms": "gate's decision after its features, p50, ms",
        "gate_p99_ms": "the same, p99, ms",
        "run_first_token_s": "`loramix run`, first token of a fresh process, s",
    }
    table = [f"| {text} | {section[key]} |" for key, text in names.items()]
    return _section("Memory and time", section, "| measure | value |", "|---|---|", *table)


def _short(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The section that comes first: one figure per cell, without intervals."""
    mixes = known["parity"]["mixes"].values()
    exact = max(places["float32 base"]["max_difference"] for places in mixes)
    kl = max(places["default base"]["mean_kl"] for places in mixes)
    run, routing = known["runtime"], found["routing"]
    rows = [
        "## In short",
        "",
        "The sections below have intervals, commands and further measures; [skills.md](skills.md) says what was tried.",
        "",
        "| skill, test rows | measure | bare base | 5 shots | adapter | routed |",
        "|---|---|---|---|---|---|",
    ]
    for skill, name, measure, part in first_measures(found):
        where = skill if name == "test" else f"{skill}, {name}"
        figures = [part[kind][measure] for kind in ("base", "base_5shot", "pinned", "routed")]
        cells = " | ".join(figure(value).partition(" ")[0] for value in figures)
        rows.append(f"| {where} | {measure} | {cells} |")
    rows += [
        "",
        "| gate, on phrasings and texts unseen in training | decided right | TF-IDF |",
        "|---|---|---|",
    ]
    rows += [
        f"| {name} | {figure(value)} | {figure(routing['rival_groups'][name])} |"
        for name, value in routing["groups"].items()
    ]
    rows += [
        "",
        f"- Routed score / score with the adapter named: {found['end_task']['fixed']:.3f}; "
        f"{routing['lost']:.1%} of skill prompts left to the base; "
        f"calibration error {routing['calibration']['error']:.3f}.",
        f"- llama.cpp against PyTorch: logits differ by up to {exact:.1g} on a float32 base; "
        f"on the default base the mean KL is {kl:.2g} at most.",
        f"- The gate decides in {run['gate_p50_ms']} ms (p99 {run['gate_p99_ms']}) after its features; "
        f"{run['resident_memory_mb']} MB resident; a fresh `loramix run` speaks after {run['run_first_token_s']} s.",
        "",
    ]
    return rows


if __name__ == "__main__":
    main()
