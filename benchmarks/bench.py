"""Everything that is measured of speed, one after another: ``make bench``.

    python benchmarks/bench.py [--shape TINYLLAMA.gguf]… [--llama-server FILE] [--rounds 9]

Writes benchmarks/results.json and the README's table. Each part runs in a process of its own and compares
inside itself, so that a noisy neighbour slows both sides of a ratio.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from evaluate import HERE, RESULTS, save

from loramix.paths import write_text

FILE = click.Path(exists=True, path_type=Path)


def run(script: str, *options: str) -> dict[str, Any]:
    """What a script of this directory measures."""
    click.echo(f"==> {script} {' '.join(options)}", err=True)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.json"
        subprocess.run(
            [sys.executable, str(HERE / script), *options, "--out", str(out)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found: dict[str, Any] = json.loads(out.read_text())
    found.pop("machine")
    return found


def ratios(mixes: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Prefill and decoding of one adapter against the bare base, and of blends against one adapter."""
    for work in ("decode", "prefill"):
        names = mixes[work]
        single = [names[n]["ratio"] for n in names if n != "bare base" and not n.startswith("blend")]
        one = statistics.median(single)
        yield f"{work}, one adapter / bare base", one
        for count in (2, 4):
            if blend := names.get(f"blend of {count}"):
                yield f"{work}, blend of {count} / one adapter", blend["ratio"] / one


def table(found: Mapping[str, Any]) -> list[str]:
    """The README's lines."""
    columns = {"default pack": dict(ratios(found["pack"]["pack"]))}
    columns |= {name: dict(ratios(mixes)) for name, mixes in found["shapes"].items()}
    lines = ["| time, as a ratio | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in columns["default pack"]:
        lines.append(f"| {row} | " + " | ".join(f"{column[row]:.2f}" for column in columns.values()) + " |")
    pack, crowd = found["pack"], found["crowd"]
    first, switch = (
        pack["first token, 100-token prompt"],
        pack["first token after a switch, 1,000-token chat"],
    )
    wise, idle = pack["token-wise"]["per token"], crowd["decode"]
    switches = pack["switches"]
    lines += [
        "",
        "| default pack | |",
        "|---|---|",
        f"| switch to a mix that was used before, p50 / p99 | {switches['seen_p50_ms']:.3f} / "
        f"{switches['seen_p99_ms']:.2f} ms |",
        f"| switch to a new blend, p50 | {switches['new_blend_p50_ms']:.0f} ms |",
        "| first token of a 100-token prompt, with the gate / skill named | "
        f"{first['gate, plain adapter']['ratio']:.2f} (late adapter {first['gate, late adapter']['ratio']:.2f}) |",
        "| first token after a switch of skill in a 1,000-token chat, late / plain adapter | "
        f"{switch['late adapter']['ratio']:.3f} |",
        f"| a token under `token` / under `top1` | {wise['token']['ratio']:.2f} |",
        f"| {crowd['skills']} skills: the gate's decision | {crowd['decision_ms']:.2f} ms |",
        f"| {crowd['skills']} skills: decode, loaded when asked for / all in native memory, against one skill | "
        f"{idle['among many, loaded when asked for']['ratio']:.3f} / "
        f"{idle['among many, all in native memory']['ratio']:.3f} |",
    ]
    lines += [
        "",
        "| a whole request: 24 tokens at most, three skills in turn | time, ratio | ms | peak MB |",
        "|---|---|---|---|",
    ]
    for peer, row in found["peers"].items():
        lines.append(f"| {peer} | {row['ratio']:.2f} | {row['ms']:.0f} | {row['memory_mb']:.0f} |")
    return lines


@click.command()
@click.option("--shape", "shapes", type=FILE, multiple=True, help="A base of which only the shape counts.")
@click.option("--llama-server", "program", type=FILE)
@click.option("--rounds", default=9, show_default=True)
def main(shapes: Sequence[Path], program: Path | None, rounds: int) -> None:
    """Measure all, and write results.json and the README's table."""
    count = ["--rounds", str(rounds)]
    found: dict[str, Any] = {"shapes": {}}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        save("bench", found)  # after each part: a later one may fail

    keep("pack", run("speed.py", *count))
    for path in shapes:
        measured = run("speed.py", "--base", str(path), *count)[path.name]
        keep("shapes", {**found["shapes"], path.stem: measured})
    keep("crowd", run("crowd.py", *count))
    keep("profile", run("profile_decode.py"))
    keep("peers", run("peers.py", *count, *(["--llama-server", str(program)] if program else []))["peers"])
    write_readme(json.loads(RESULTS.read_text())["bench"])


def write_readme(found: Mapping[str, Any]) -> None:
    """Put the table into the README, between its marks."""
    readme = HERE.parent / "README.md"
    text = "\n".join([*table(found), "", f"`make bench`, on {found['machine']}; medians.", ""])
    block = re.compile(r"(<!-- bench -->\n).*?(<!-- end of bench -->)", re.DOTALL)
    old = readme.read_text(encoding="utf-8")
    write_text(readme, block.sub(lambda match: match[1] + text + match[2], old))


if __name__ == "__main__":
    main()
