"""Runs all speed benchmarks in sequence: ``make bench``.

    python benchmarks/bench.py [--shape TINYLLAMA.gguf]… [--llama-server FILE] [--rounds 9] [--part NAME]…

Writes benchmarks/results.json and the table of docs/performance.md; with --part the results of other parts are kept.
Each part runs in a separate process and compares within it, so that load from other programs affects both sides of
a ratio.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from evaluate import HERE, RESULTS, save

from loramix.paths import write_text

FILE = click.Path(exists=True, path_type=Path)
PARTS = ("pack", "shapes", "crowd", "profile", "peers")


def run(script: str, *options: str) -> dict[str, Any]:
    """Run a script of this directory; return its results."""
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
    """Yield the ratios of prefill and decode: one adapter to the bare base, and blends to one adapter."""
    for work in ("decode", "prefill"):
        names = mixes[work]
        single = [names[n]["ratio"] for n in names if n != "bare base" and not n.startswith("blend")]
        one = statistics.median(single)
        yield f"{work}, one adapter / bare base", one
        for count in (2, 4):
            if blend := names.get(f"blend of {count}"):
                yield f"{work}, blend of {count} / one adapter", blend["ratio"] / one


def table(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of docs/performance.md for the results."""
    lines: list[str] = []
    columns = {"default pack": dict(ratios(found["pack"]["pack"]))} if "pack" in found else {}
    columns |= {name: dict(ratios(mixes)) for name, mixes in found.get("shapes", {}).items()}
    if columns:
        lines += ["| time, as a ratio | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in next(iter(columns.values())):
            lines.append(
                f"| {row} | " + " | ".join(f"{column[row]:.2f}" for column in columns.values()) + " |"
            )
    rows = [*_pack_rows(found.get("pack")), *_crowd_rows(found.get("crowd"))]
    if rows:
        lines += ["", "| default pack | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]
    if "peers" in found:
        head = "| a whole request: 24 tokens at most, three skills in turn | time, ratio | ms | peak MB |"
        lines += ["", head, "|---|---|---|---|"]
        for peer, row in found["peers"].items():
            lines.append(f"| {peer} | {row['ratio']:.2f} | {row['ms']:.0f} | {row['memory_mb']:.0f} |")
    return lines


def _pack_rows(pack: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if pack is None:
        return
    switches = pack["switches"]
    first, switch = (
        pack["first token, 100-token prompt"],
        pack["first token after a switch, 1,000-token chat"],
    )
    wise = pack["token-wise"]["per token"]
    ratios = " / ".join(f"{wise[name]['ratio']:.2f}" for name in ("blend", "token", "token, moved"))
    known = f"{switches['seen_p50_ms']:.3f} / {switches['seen_p99_ms']:.2f} ms"
    yield "switch to a mix that was used before, p50 / p99", known
    yield "switch to a new blend, p50", f"{switches['new_blend_p50_ms']:.0f} ms"
    late = f"{first['gate, plain adapter']['ratio']:.2f} (late adapter {first['gate, late adapter']['ratio']:.2f})"
    yield "first token of a 100-token prompt, with the gate / skill named", late
    ratio = f"{switch['late adapter']['ratio']:.3f}"
    yield "first token after a switch of skill in a 1,000-token chat, late / plain adapter", ratio
    yield "a token under `blend` / under `token` / where that moves every 8 tokens, against `top1`", ratios


def _crowd_rows(crowd: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if crowd is None:
        return
    asked, loaded = (
        crowd["decode"][f"among many, {how}"]["ratio"]
        for how in ("loaded when asked for", "all in native memory")
    )
    yield f"{crowd['skills']} skills: the gate's decision", f"{crowd['decision_ms']:.2f} ms"
    what = (
        f"{crowd['skills']} skills: decode, loaded when asked for / all in native memory, against one skill"
    )
    yield what, f"{asked:.3f} / {loaded:.3f}"


@click.command()
@click.option(
    "--shape", "shapes", type=FILE, multiple=True, help="A base with random weights, for its shape."
)
@click.option("--llama-server", "program", type=FILE)
@click.option("--rounds", default=9, show_default=True)
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, help="Run only this part; can be repeated."
)
def main(shapes: Sequence[Path], program: Path | None, rounds: int, parts: Sequence[str]) -> None:
    """Run the benchmarks, and write results.json and the table of docs/performance.md."""
    count = ["--rounds", str(rounds)]
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found: dict[str, Any] = dict(known.get("bench", {})) if parts else {}
    server = ["--llama-server", str(program)] if program else []
    work: dict[str, Callable[[], Any]] = {
        "pack": lambda: run("speed.py", *count),
        "shapes": lambda: {p.stem: run("speed.py", "--base", str(p), *count)[p.name] for p in shapes},
        "crowd": lambda: run("crowd.py", *count),
        "profile": lambda: run("profile_decode.py"),
        "peers": lambda: run("peers.py", *count, *server)["peers"],
    }
    for name in parts or PARTS:
        found[name] = work[name]()
        save("bench", found)  # after each part, because a later one may fail
    write_table(json.loads(RESULTS.read_text())["bench"])


def write_table(found: Mapping[str, Any]) -> None:
    """Replace the table in docs/performance.md between its markers."""
    page = HERE.parent / "docs" / "performance.md"
    text = "\n".join([*table(found), "", f"`make bench`, on {found['machine']}; medians.", ""])
    block = re.compile(r"(<!-- bench -->\n).*?(<!-- end of bench -->)", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    write_text(page, block.sub(lambda match: match[1] + text + match[2], old))


if __name__ == "__main__":
    main()
