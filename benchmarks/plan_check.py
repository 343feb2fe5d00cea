"""Accuracy of `loramix plan`: predicted against measured memory of engines in separate processes.

    python benchmarks/plan_check.py --out plan.json [--base FILE --skills 8 --ctx 2048]

Without --base, measures the default pack with 1 and 12 skills at 512, 2,048 and 8,192 tokens; with --base, random
adapters of rank 8 on that GGUF, because the values of weights do not affect their memory. VmRSS is read after the
last answer. A few answers do not fill the KV store and the contexts, so the prediction uses their measured sizes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import loramix
from loramix.paths import write_text

WORDS = (
    "the old harbour was quiet that morning and nobody saw the small boat leave before the rain came down "
)


def status() -> dict[str, int]:
    """Return VmRSS and its parts, and VmHWM, of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    rows = (line.split(":", 1) for line in lines if line.startswith(("Vm", "Rss")))
    return {name: 1024 * int(value.split()[0]) for name, value in rows}


def child(pack: str, n_skills: int, n_ctx: int) -> dict[str, Any]:
    """Answer with each of the first skills of a pack, then long prompts with the bare base and two skills."""
    from loramix import Engine

    with Engine.open(pack, n_ctx=n_ctx) as engine:
        opened = status()["VmRSS"]
        names = [skill.name for skill in engine.pack.skills[:n_skills]]
        cases = [(name, 3) for name in names] + [
            (name, min(n_ctx // 32, 28)) for name in ("base", *names[-2:])
        ]
        for number, (name, repeats) in enumerate(cases):
            # 20 tokens per repetition; the longest prompts fill a batch of 512
            engine.generate(f"{number} " + WORDS * repeats, mix=name, max_tokens=4)
        return {
            "opened": opened,
            **{name: status()[name] for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")},
            "rooms": [engine.decoder.pool.get(mix).capacity for mix in engine.decoder.pool.mixes],
            "adapters": len(engine.decoder.adapters.mixes),
            "kept": engine.decoder.pool.saved.nbytes,
        }


def random_pack(directory: Path, base: Path, n_skills: int) -> Path:
    """Create a pack of random adapters of rank 8 on any base, without a gate."""
    from speed import random_adapter

    from loramix.formats.validate import read_base
    from loramix.models import bases
    from loramix.pack.edit import add_skill, new_pack

    _, shape = read_base(base)
    new_pack(directory, str(base.absolute()), bases.digest(base))
    for seed in range(n_skills):
        adapter = random_adapter(shape, 8, seed=seed)
        add_skill(directory, f"skill{seed}", adapter, description="random", max_tokens=4)
    return directory


def compare(pack: str, n_skills: int, n_ctx: int) -> dict[str, Any]:
    """Predict and measure the memory of one case."""
    from loramix.diagnose.memory_plan import kv_bytes, make_plan
    from loramix.formats.validate import read_base
    from loramix.models import bases
    from loramix.pack.pack import Pack

    found = Pack.load(pack)
    base = bases.resolve(found.manifest.base.name)
    planned = make_plan(base, n_ctx=n_ctx, pack=found, n_skills=n_skills)
    command = [sys.executable, __file__, "--child", json.dumps([pack, n_skills, n_ctx])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    parts = {part.name: part.size_bytes for part in planned.memory}
    file, shape = read_base(base)
    kv = sum(kv_bytes(file, shape, room) for room in measured["rooms"])
    predicted = planned.memory_bytes - parts["KV store"] + measured["kept"] - parts["KV"] + kv
    row = {"base": base.name, "skills": n_skills, "ctx": n_ctx, "predicted": predicted, **measured}
    return {**row, "off": predicted / measured["VmRSS"] - 1, "full": planned.memory_bytes, "parts": parts}


@click.command()
@click.option("--base", type=click.Path(path_type=Path), help="A GGUF; by default the default pack's.")
@click.option("--skills", multiple=True, type=int, help="Numbers of skills.")
@click.option("--ctx", multiple=True, type=int, help="Contexts in tokens.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON to write.")
@click.option("--child", "child_of", hidden=True)
def main(
    base: Path | None, skills: tuple[int, ...], ctx: tuple[int, ...], out: Path | None, child_of: str | None
) -> None:
    """Compare predicted with measured memory."""
    if child_of:
        click.echo(json.dumps(child(*json.loads(child_of))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for n_skills in skills or (1, 12):
            pack = loramix.DEFAULT
            if base is not None:
                pack = str(random_pack(Path(temporary) / f"pack{n_skills}", base, n_skills))
            for n_ctx in ctx or (512, 2048, 8192):
                rows.append(row := compare(pack, n_skills, n_ctx))
                mb = {name: row[name] / 1e6 for name in ("predicted", "VmRSS", "VmHWM")}
                click.echo(
                    f"{row['base']:<32} {n_skills:>2} skills {n_ctx:>5} tokens: predicted {mb['predicted']:5.0f} MB, "
                    f"measured {mb['VmRSS']:5.0f} MB ({row['off']:+.1%}), peak {mb['VmHWM']:5.0f} MB"
                )
    if out:
        write_text(out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
