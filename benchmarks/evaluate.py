"""Measures that ``loramix eval`` lacks, and the page docs/results.md.

    python benchmarks/evaluate.py parity              compare every adapter and a mix with PyTorch
    python benchmarks/evaluate.py runtime             memory, gate time, first token
    python benchmarks/evaluate.py report REPORT.json  docs/results.md

``report`` reads the report of ``loramix eval`` and stores a copy in benchmarks/report.json. ``parity``, ``runtime``,
multitask.py and add_skill.py write their results to benchmarks/results.json.
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
from loramix.pack.manifest import MANIFEST
from loramix.pack.pack import Pack
from loramix.paths import sha256_file, write_text

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
    """Write results to results.json with the command (by default this one) and the machine, and print them."""
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
@click.option("--skill", "anew", multiple=True, help="Measure only this skill; the others' results are kept.")
def parity(pack: str, anew: tuple[str, ...]) -> None:
    """Compare the pack's adapters and a mix with PyTorch, on a float32 copy of the base and on the base itself."""
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
    # skills can be measured one by one, with the same results as the complete command
    save("parity", {"mixes": result}, command="python benchmarks/evaluate.py parity")


@main.command()
def runtime() -> None:
    """Measure memory with the pack loaded, the gate's time, and the time to the first token of a fresh process."""
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
    found["routing"].pop("errors", None)  # they contain texts of the data
    write_text(REPORT, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    known = json.loads(RESULTS.read_text())
    head, _, sections = to_markdown(found).partition("\n")[2].partition("\n## ")
    limits = "".join(f" --{name} {limit}" for name, limit in found["limits"].items() if limit)
    lines = [
        "# Results of the default pack",
        "",
        _measured(found),
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


def _measured(found: Mapping[str, Any]) -> str:
    """Return one line that says which pack the figures are of, and when they were measured."""
    digest = found["pack"]["manifest_sha256"]
    which = f"pack `{found['pack']['name']}`, manifest `{digest[:12]}`, measured on {found['date']}"
    if digest == sha256_file(Pack.load(DEFAULT).directory / MANIFEST):
        return f"All figures are of the {which}."
    return (
        f"All figures are of an **earlier version** of the {which}: its adapters were each trained on one source, "
        "and its gate is of format 1. For the version that ships now, see [everyday.md](everyday.md) (skills) and "
        "[gate.md](gate.md#results) (gate)."
    )


def _section(title: str, section: Mapping[str, Any], *head: str) -> list[str]:
    return ["", f"## {title}", "", f"`{section['command']}`, on {section['machine']}.", "", *head]


def first_measures(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Yield (skill, test set, first measure, all kinds) of each test set of a report."""
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
            columns["its own adapter, as few rows"] = alone["skills"]
        columns["one adapter for all"] = rival
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
        ("gate update, conversion and checks, without training", f"{section['update_s']} s"),
        ("reload by a running engine", f"{section['reload_s']} s"),
        ("removal", f"{section['remove_s']} s"),
        (
            f"gate's accuracy on {section['prompts']} prompts for the other skills, before",
            f"{section['others_before']:.4f}",
        ),
        ("the same, with the new skill", f"{section['others_after']:.4f}"),
        ("the same, after its removal", f"{section['others_after_removal']:.4f}"),
        ("gate's accuracy on the new skill's held-out phrasings", f"{section['new_skill_routed']:.3f}"),
        ("the new skill's answers, pinned", new),
    ]
    table = ["| measure | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    return _section("A thirteenth skill, translate_de", section, *table)


def _parity(section: Mapping[str, Any] | None) -> list[str]:
    if section is None:
        return []
    lines = _section(
        "The same adapters in PyTorch",
        section,
        "Logits of the runtime compared with PyTorch's, at all positions of three texts. On a float32 base only the "
        "conversion can cause differences; on the default base llama.cpp also rounds activations to 8 bits.",
        "",
        "| mix | float32 base: largest difference | default base: largest difference | mean KL | same top token |",
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
        "gate_p50_ms": "gate's head, without the base's layers, p50, ms",
        "gate_p99_ms": "the same, p99, ms",
        "run_first_token_s": "`loramix run`, a new process up to the first token, s",
    }
    table = [f"| {text} | {section[key]} |" for key, text in names.items()]
    return _section("Memory and time", section, "| measure | value |", "|---|---|", *table)


def _short(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Return the first section: one figure per cell, without intervals."""
    mixes = known["parity"]["mixes"].values()
    exact = max(places["float32 base"]["max_difference"] for places in mixes)
    kl = max(places["default base"]["mean_kl"] for places in mixes)
    run, routing = known["runtime"], found["routing"]
    rows = [
        "## In short",
        "",
        "The sections below have intervals, commands and further measures; [skills.md](skills.md) has targets and "
        "experiments.",
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
        "| prompts in phrasings and on texts unseen in training | accuracy of the gate | of TF-IDF |",
        "|---|---|---|",
    ]
    rows += [
        f"| {name} | {figure(value)} | {figure(routing['rival_groups'][name])} |"
        for name, value in routing["groups"].items()
    ]
    rows += [
        "",
        f"- Routed score divided by pinned score: {found['end_task']['fixed']:.3f}; "
        f"{routing['lost']:.1%} of the prompts for a skill are routed to the bare base; "
        f"the gate's calibration error is {routing['calibration']['error']:.3f}.",
        f"- llama.cpp against PyTorch: logits differ by up to {exact:.1g} on a float32 base; "
        f"on the default base the mean KL divergence is at most {kl:.2g}.",
        f"- The gate's head takes {run['gate_p50_ms']} ms (p99 {run['gate_p99_ms']}); "
        f"resident memory is {run['resident_memory_mb']} MB; "
        f"a new `loramix run` prints its first token after {run['run_first_token_s']} s.",
        "",
    ]
    return rows


if __name__ == "__main__":
    main()
