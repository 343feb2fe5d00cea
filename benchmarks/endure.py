"""Endurance of the server: thousands of mixed requests, and signals during answers.

    python benchmarks/endure.py soak [--requests 10000]
    python benchmarks/endure.py signals [--times 20]

The server runs in a separate process with default settings; requests use loopback.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import httpx
from load import CHAT, bodies, connect, files, pieces, resident, talkers
from serving import served

import loramix
from loramix.pack.pack import Pack

BUSY = {429, 503}
"""Status code for a full queue."""


def one(client: httpx.Client, kind: str, body: dict[str, Any]) -> tuple[str, int]:
    """Send a request of some kind; return the kind and the status."""
    name = body["model"].partition(":")[0]
    prompt = body["messages"][0]["content"]
    if kind == "leaves":
        with client.stream("POST", CHAT, json={**body, "stream": True, "max_tokens": 32}) as answer:
            next(answer.iter_raw(), None)
            return kind, answer.status_code
    if kind == "streams":
        with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
            text = answer.read()
            whole = answer.status_code != 200 or (b"[DONE]" in text and b'"error"' not in text)
            return kind, answer.status_code if whole else 500
    sent: dict[str, tuple[str, Any]] = {
        "named": (CHAT, body),
        "routed": (CHAT, {**body, "model": name}),
        "blended": (CHAT, {**body, "model": name, "loramix": {"mix": {"sentiment": 0.5, "spam": 0.5}}}),
        "ollama": ("/api/generate", {"model": name, "prompt": prompt, "options": {"num_predict": 2}}),
        "route": ("/v1/route", {"model": name, "messages": body["messages"]}),
        "embed": ("/v1/embeddings", {"model": name, "input": prompt}),
        "bad": (CHAT, {**body, "max_tokens": -1}),
    }
    path, content = sent[kind]
    return kind, client.post(path, json=content).status_code


def soaked(pack: Pack, requests: int) -> dict[str, Any]:
    """Send requests of all kinds from 8 clients; compare memory and open files before and after."""
    rng = random.Random(0)
    kinds = (
        ["named"] * 5 + ["streams"] * 3 + ["routed", "blended", "ollama", "route", "embed", "leaves", "bad"]
    )
    skills = [*(skill.name for skill in pack.skills), "base"]
    asked = bodies(pack, skills, 200, max_tokens=2)
    with served(pack.directory) as server, connect(server, 8) as client, ThreadPoolExecutor(8) as threads:

        def run(count: int) -> Counter[tuple[str, int]]:
            drawn = [(rng.choice(kinds), rng.choice(asked)) for _ in range(count)]
            return Counter(threads.map(lambda it: one(client, *it), drawn))

        run(500)
        memory, open_files, began = resident(server), files(server), time.perf_counter()
        found = run(requests)
        seconds = time.perf_counter() - began
        time.sleep(1)
        after, left = resident(server), files(server) - open_files
        health = server.http.get("/health").json()
    by_status: Counter[int] = Counter()
    for (_, status), count in found.items():
        by_status[status] += count
    wrong = {
        f"{kind} {status}": count
        for (kind, status), count in found.items()
        if status not in BUSY and status != (200 if kind != "bad" else 400)
    }
    return {
        "requests": requests,
        "seconds": round(seconds),
        "by_status": dict(sorted(by_status.items())),
        "unexpected": wrong,
        "memory_grows_percent": 100 * (after / memory - 1),
        "files_more": left,
        "restarts": health["restarts"],
    }


def signalled(pack: Pack, times: int) -> dict[str, Any]:
    """Send SIGTERM and SIGINT in turn during a stream; check that it is complete and the server exits cleanly."""
    ended: list[float] = []
    found: Counter[str] = Counter()
    (name,) = talkers(pack, 1)
    for number in range(times):
        with served(pack.directory) as server, connect(server) as client:
            (body,) = bodies(pack, [name], 1, max_tokens=64)
            began, last = 0.0, None
            for _, chunk in pieces(client, body):
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content") and not began:
                    server.process.send_signal(signal.SIGINT if number % 2 else signal.SIGTERM)
                    began = time.perf_counter()
                last = chunk["choices"][0]["finish_reason"] if chunk["choices"] else last
            code = server.process.wait(20)
            ended.append(time.perf_counter() - began)
            found["answers whole"] += last in ("stop", "length")
            found[f"exit code {code}"] += 1
    return {
        "times": times,
        **found,
        "ended_median_s": statistics.median(ended),
        "ended_worst_s": max(ended),
    }


@click.group()
def main() -> None:
    """Measure the server of a pack."""


@main.command()
@click.option("--pack", "-p", default=loramix.DEFAULT, show_default=True)
@click.option("--requests", default=10_000, show_default=True)
def soak(pack: str, requests: int) -> None:
    """Send thousands of mixed requests."""
    click.echo(json.dumps({"soak": soaked(Pack.load(pack), requests)}))


@main.command()
@click.option("--pack", "-p", default=loramix.DEFAULT, show_default=True)
@click.option("--times", default=20, show_default=True)
def signals(pack: str, times: int) -> None:
    """Send signals during answers."""
    click.echo(json.dumps({"signals": signalled(Pack.load(pack), times)}))


if __name__ == "__main__":
    main()
