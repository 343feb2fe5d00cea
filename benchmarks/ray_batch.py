"""Compares `loramix batch --ray` with the one-machine batch: texts, time, and what kills cost.

    python benchmarks/ray_batch.py --rows 2000 --kills 3 --driver-kills 2

Prompts are phrasings of the pack's twelve skills around short made-up texts. Both batches get the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import psutil

PHRASINGS = Path(__file__).parent.parent / "loramix/train/phrasings"
TEXTS = {
    "sentiment": "{name} wasted {n} evenings on that film about {place}.",
    "spam": "{name}, you won {n} euros in {place}! Reply YES now.",
    "emotion": "I cannot believe {name} left {place} {n} days early.",
    "entities": "{name} flew from {place} to Oslo with {n} friends.",
    "intent": "My card has not arrived in {place} after {n} days, {name} says.",
    "summarize": "The factory in {place} closes in March. {n} people lose their jobs, said {name}.",
    "translate_fr": "{name} has {n} cats in {place}",
    "facts": "name[{name}], eatType[pub], area[{place}], rating[{n}]",
    "slots": "wake {name} at {n} o'clock in {place}",
    "shell": "list the {n} largest files of {name} under /srv/{place}",
    "sql": "people(name, age, city). Who in {place} is older than {n} and not {name}?",
    "docstring": "def greet_{name}(n={n}):\n    return '{place}' * n",
}
NAMES = ["Lena", "Omar", "Ruth", "Ivan", "Mei", "Paul", "Anna", "Noor"]
PLACES = ["Lyon", "Leeds", "Porto", "Graz", "Turin", "Ghent", "Kyoto"]


def prompts(count: int) -> list[dict[str, Any]]:
    """Return distinct prompts, the skills in turn."""
    rows: list[dict[str, Any]] = []
    phrasings = {}
    for skill in TEXTS:
        found = tomllib.loads((PHRASINGS / f"{skill}.toml").read_text(encoding="utf-8"))
        phrasings[skill] = [text for texts in found.values() if isinstance(texts, list) for text in texts]
    while len(rows) < count:
        i = len(rows)
        skill = list(TEXTS)[i % len(TEXTS)]
        round_ = i // len(TEXTS)
        text = TEXTS[skill].format(name=NAMES[round_ % 8], place=PLACES[round_ % 7], n=round_ + 2)
        asked = phrasings[skill][round_ % len(phrasings[skill])].replace("{input}", text)
        rows.append({"id": f"r{i:05}", "skill": skill, "prompt": asked})
    return rows


def run(words: list[str]) -> dict[str, float]:
    """Run a command of loramix; return its seconds, and those of CPU."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "loramix", *words], check=True)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.perf_counter() - started, "cpu_s": cpu_s}


def answer_with_kills(words: list[str], out: Path, workers: int, drivers: int) -> dict[str, Any]:
    """Run a batch on a cluster; kill workers and the driver with SIGKILL, evenly over the run."""
    killed = {"workers": 0, "drivers": 0}
    started, first = time.perf_counter(), 0.0
    cpu_s: dict[int, float] = {}
    while True:
        driver = subprocess.Popen([sys.executable, "-m", "loramix", *words])
        seen = len(files_of(out))
        while driver.poll() is None:
            time.sleep(0.5)
            cpu_s.update(cpu_of(driver.pid))
            now = len(files_of(out))
            if now and not first:
                first = time.perf_counter() - started
            if now <= seen:
                continue
            seen = now
            if killed["workers"] < workers and (pids := workers_of(driver.pid)):
                os.kill(pids[0], signal.SIGKILL)
                killed["workers"] += 1
            elif killed["drivers"] < drivers:
                driver.kill()
                driver.wait()
                killed["drivers"] += 1
        if driver.returncode == 0:
            break
        assert driver.returncode == -signal.SIGKILL, driver.returncode
    rows = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files_of(out))
    return {
        "seconds": time.perf_counter() - started,
        "first_file_s": first,
        "cpu_s": sum(cpu_s.values()),
        "rows": rows,
        "killed": killed,
    }


def files_of(out: Path) -> list[Path]:
    """Finished files of the output, in the order of the input."""
    return sorted(out.glob("[!_.]*.jsonl"))


def workers_of(pid: int) -> list[int]:
    """Process ids of the workers that answer for a driver."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if any("MapBatches(Answerer)" in word for word in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def cpu_of(pid: int) -> dict[int, float]:
    """Seconds of CPU of a process and all below it, by process id."""
    found = {}
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    except psutil.Error:
        pass
    return found


def compare(one: Path, out: Path) -> dict[str, int]:
    """Compare rows: missing, doubled, and those whose fields differ, the use of caches aside."""
    wanted = {row["line"]: row for row in map(json.loads, one.read_text(encoding="utf-8").splitlines())}
    found = [
        json.loads(line) for file in files_of(out) for line in file.read_text(encoding="utf-8").splitlines()
    ]
    for row in [*wanted.values(), *found]:
        row.get("usage", {}).pop("cached_tokens", None)
    return {
        "rows": len(found),
        "missing": len(wanted.keys() - {row["line"] for row in found}),
        "doubled": len(found) - len({row["line"] for row in found}),
        "same_text": sum(row.get("text") == wanted[row["line"]].get("text") for row in found),
        "same_row": sum(row == wanted[row["line"]] for row in found),
    }


def main() -> None:
    """Run the comparison and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds, the two batches in turn")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--driver-kills", type=int, default=0)
    parser.add_argument("--rows-per-file", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of the batch on one machine")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--pack", default="smollm2-135m")
    args = parser.parse_args()
    result: dict[str, Any] = {"rows": args.rows, "rounds": []}
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "in.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in prompts(args.rows)), encoding="utf-8")
        for i in range(args.rounds):
            one, out = Path(place, f"one{i}.jsonl"), Path(place, f"out{i}")
            both = ["-n", str(args.max_tokens), "-p", args.pack]
            on_ray = ["--ray", "--workers", "2", "--rows-per-file", str(args.rows_per_file)]
            single = run(["batch", str(source), str(one), "--threads", str(args.threads), *both])
            ray = answer_with_kills(
                ["batch", str(source), str(out), *on_ray, *both], out, args.kills, args.driver_kills
            )
            result["rounds"].append({"single": single, "ray": ray, **compare(one, out)})
            print(json.dumps(result["rounds"][-1]), file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
