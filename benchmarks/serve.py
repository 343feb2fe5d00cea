"""Overhead, throughput and robustness of the server; each measurement is a command, results are JSON.

    python benchmarks/serve.py overhead|throughput|isolation|queue|leaving|killed|memory|openapi|batch|long_prompt

The server runs in a separate process with default settings; clients connect over loopback. Times need an idle
machine, counts do not.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx
from load import CHAT, Body, ask, bodies, connect, files, first_text, many, pieces, resident, said, talkers
from serving import openapi_cases, served

import loramix
from loramix.pack.pack import Pack


def overhead(pack: Pack, rounds: int) -> dict[str, Any]:
    """Send the same request to an engine in this process and to the server, in turn."""
    from loramix import Engine

    (name,) = talkers(pack, 1)
    later, slower = [], []
    with served(pack.directory) as server, Engine.open(pack.directory, contexts=4) as engine:
        for number, body in enumerate(bodies(pack, [name], rounds + 1, max_tokens=64)):
            began = time.perf_counter()
            stream = engine.stream(body["messages"], mix=name, max_tokens=64)
            direct = [time.perf_counter() - began for _ in stream]
            end = time.perf_counter() - began
            chunks = list(pieces(server.http, body))  # the last one has the finish reason
            first = next(at for at, chunk in chunks if chunk["choices"][0]["delta"].get("content"))
            if number:
                later.append(first - direct[0])
                slower.append((chunks[-1][0] - first) / (end - direct[0]) - 1)
    return {
        "first_token_ms": 1000 * statistics.median(later),
        "slower_percent": 100 * statistics.median(slower),
        "rounds": rounds,
    }


def throughput(pack: Pack, rounds: int) -> dict[str, Any]:
    """Compare tokens per second of eight clients with one, on one mix and on four."""
    found: dict[str, Any] = {}
    with served(pack.directory, "--queue", "64") as server:
        for name, skills in (("one_mix", talkers(pack, 1)), ("four_mixes", talkers(pack, 4))):
            asked = bodies(pack, skills, 48, max_tokens=64)
            rates: dict[int, list[float]] = {1: [], 8: []}
            for number, clients in itertools.product(range(rounds + 1), (1, 8)):
                answers, seconds = many(server, asked if number else asked[:8], clients)
                if number:
                    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
                    rates[clients].append(tokens / seconds)
            ratio = statistics.median(b / a for a, b in zip(rates[1], rates[8], strict=True))
            medians = {f"clients_{n}_tokens_s": statistics.median(found) for n, found in rates.items()}
            found[name] = {**medians, "ratio": ratio}
    return found


def isolation(pack: Pack, rounds: int) -> dict[str, Any]:
    """Compare the answers to concurrent requests (8 threads, 10 each per round, four mixes) with sequential ones."""
    sets = {
        "first_skills": [skill.name for skill in pack.skills[:4]],
        "longest_answers": [*talkers(pack, 3), "base"],
    }
    found: dict[str, Any] = {}
    with served(pack.directory, "--queue", "64") as server:
        for name, skills in sets.items():
            asked = bodies(pack, skills, 20 * rounds, max_tokens=24)
            alone = [said(answer) for answer in many(server, asked, 1)[0]]
            together = [said(answer) for answer in many(server, asked * 4, 8)[0]]
            rows = zip(asked * 4, together, alone * 4, strict=True)
            equal = Counter(body["model"].partition(":")[2] for body, a, b in rows if a == b)
            found[name] = {"requests": len(together), "equal": equal.total(), "by_skill": dict(equal)}
    return found


def queue(pack: Pack, rounds: int) -> dict[str, Any]:
    """Send 64 concurrent requests to a queue of 16, and request /health meanwhile."""
    asked = bodies(pack, talkers(pack, 1), 64, max_tokens=48)
    found: Counter[str] = Counter()
    health: list[float] = []
    refused: list[float] = []
    with served(pack.directory) as server:
        ask(server.http, asked[0])
        over = threading.Event()

        def watch() -> None:
            with connect(server) as client:
                while not over.is_set():
                    began = time.perf_counter()
                    client.get("/health").raise_for_status()
                    health.append(time.perf_counter() - began)
                    time.sleep(0.01)

        def one(body: Body) -> None:
            began = time.perf_counter()
            try:
                answer = client.post(CHAT, json=body)
                found[str(answer.status_code)] += 1
                if answer.status_code == 429:
                    refused.append(time.perf_counter() - began)
                    found["without_retry_after"] += "retry-after" not in answer.headers
            except httpx.TransportError:
                found["reset"] += 1

        watcher = threading.Thread(target=watch)
        watcher.start()
        with connect(server, 64) as client, ThreadPoolExecutor(64) as threads:
            list(threads.map(one, asked))
        over.set()
        watcher.join()
    p99 = statistics.quantiles(health, n=100)[98]
    return {
        **found,
        "health_p99_ms": 1000 * p99,
        "health_asked": len(health),
        "slowest_refusal_ms": 1000 * max(refused, default=0),
    }


def leaving(pack: Pack, rounds: int) -> dict[str, Any]:
    """Disconnect clients after three tokens, then four times as many immediately, with a request after each."""
    (name,) = talkers(pack, 1)
    asked = bodies(pack, [name], 100 * rounds + 20, max_tokens=64)
    with served(pack.directory) as server:
        calm = [first_text(server.http, body) for body in asked[:20]]
        after: dict[str, list[float]] = {"mid_stream": [], "at_once": []}
        for number in range(50 * rounds):
            with connect(server) as client:
                kind, texts = ("mid_stream", 3) if number < 10 * rounds else ("at_once", 0)
                for _, chunk in pieces(client, asked[20 + 2 * number]):
                    texts -= bool(chunk["choices"][0]["delta"].get("content"))
                    if texts <= 0:
                        break
            after[kind].append(first_text(server.http, asked[21 + 2 * number]))
        restarts = server.http.get("/health").json()["restarts"]
    usual = statistics.median(calm)
    later = {f"{kind}_later_ms": 1000 * (statistics.median(times) - usual) for kind, times in after.items()}
    worst = {f"{kind}_worst_later_ms": 1000 * (max(times) - usual) for kind, times in after.items()}
    return {**later, **worst, "first_token_ms": 1000 * usual, "crashes": restarts}


def killed(pack: Pack, rounds: int) -> dict[str, Any]:
    """Kill the worker four times per round under load, with SIGKILL and with abort."""
    asked = bodies(pack, talkers(pack, 2), 4, max_tokens=64)
    back: list[float] = []
    statuses: Counter[int] = Counter()
    with served(pack.directory) as server:
        over = threading.Event()

        def load(body: Body) -> None:
            with connect(server) as client:
                while not over.is_set():
                    statuses[client.post(CHAT, json=body).status_code] += 1

        threads = [threading.Thread(target=load, args=(body,)) for body in asked]
        for thread in threads:
            thread.start()
        for number in range(4 * rounds):
            time.sleep(1)
            (worker,) = server.workers()
            os.kill(worker, signal.SIGABRT if number % 2 else signal.SIGKILL)
            began = time.perf_counter()
            while server.http.get("/health").json()["restarts"] <= number:
                time.sleep(0.005)
            while server.http.get("/health").status_code != 200:
                time.sleep(0.01)
            back.append(time.perf_counter() - began)
        over.set()
        for thread in threads:
            thread.join()
        up = ask(server.http, asked[0])["choices"][0]["finish_reason"]
    return {
        "kills": len(back),
        "back_median_s": statistics.median(back),
        "back_worst_s": max(back),
        "statuses": dict(statuses),
        "last": up,
    }


def memory(pack: Pack, rounds: int) -> dict[str, Any]:
    """Compare resident memory and open files after 100 requests to all skills and after 200 more per round."""
    skills = [*(skill.name for skill in pack.skills), "base"]
    with served(pack.directory, "--queue", "64") as server:
        many(server, bodies(pack, skills, 100, max_tokens=8), 8)
        open_files = files(server)
        before = resident(server)
        many(server, bodies(pack, skills, 200 * rounds, max_tokens=8), 8)
        time.sleep(1)
        after = resident(server)
        left = files(server) - open_files
    return {
        "mb_before": before / 2**20,
        "mb_after": after / 2**20,
        "grows_percent": 100 * (after / before - 1),
        "files_more": left,
    }


def openapi(pack: Pack, rounds: int) -> dict[str, Any]:
    """Send requests generated by Schemathesis, twenty per endpoint and round."""
    with served(pack.directory, "--ctx", "256") as server:
        return openapi_cases(server.url, 20 * rounds, pack.name)


def batch(pack: Pack, rounds: int) -> dict[str, Any]:
    """Answer 48 routed prompts to four skills: eight concurrently compared with one by one."""
    from loramix import Engine
    from loramix.runtime.batch import run_batch

    seconds: dict[int, list[float]] = {1: [], 8: []}
    rows: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as temporary, Engine.open(pack.directory) as engine:
        source = Path(temporary) / "in.jsonl"
        asked = bodies(pack, talkers(pack, 4), 48)
        source.write_text("".join(json.dumps({"prompt": body["messages"]}) + "\n" for body in asked))
        for number, parallel in itertools.product(range(rounds + 1), seconds):
            out = Path(temporary) / f"{number}-{parallel}.jsonl"
            began = time.perf_counter()
            run_batch(engine, source, out, parallel=parallel)
            if number:
                seconds[parallel].append(time.perf_counter() - began)
            rows[parallel] = out.read_text()
    texts = {n: [json.loads(line)["text"] for line in text.splitlines()] for n, text in rows.items()}
    return {
        "one_by_one_s": statistics.median(seconds[1]),
        "eight_at_once_s": statistics.median(seconds[8]),
        "times_faster": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "lines": len(asked),
        "equal": sum(a == b for a, b in zip(*texts.values(), strict=True)),
    }


def long_prompt(pack: Pack, rounds: int) -> dict[str, Any]:
    """Measure the longest pause of a stream while a routed prompt of about 1,500 tokens is prefilled."""
    calm, disturbed, first = [], [], []
    story: Body = {"model": f"{pack.name}:base", "max_tokens": 800}
    with served(pack.directory) as server, connect(server) as other, ThreadPoolExecutor(1) as threads:
        for number in range(rounds):
            text = f"Summarize: {number}. " + "The council met for six hours and did not decide. " * 130
            asked: Body = {
                "model": pack.name,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 4,
            }
            body = {
                **story,
                "messages": [{"role": "user", "content": f"Tell me a long story, number {number}."}],
            }
            at: list[float] = []
            began, reading = 0.0, None
            for when, _ in pieces(server.http, body):
                at.append(when)
                if len(at) == 8:
                    began, reading = when, threads.submit(other.post, CHAT, json=asked)
                if reading is not None and reading.done():
                    break
            assert reading is not None
            reading.result().raise_for_status()
            gaps = [(b - a, b > began > 0) for a, b in itertools.pairwise(at)]
            calm.append(max(gap for gap, during in gaps[1:] if not during))
            disturbed.append(max(gap for gap, during in gaps if during))
            first.append(reading.result().elapsed.total_seconds())
    return {
        "worst_pause_alone_ms": 1000 * max(calm),
        "worst_pause_ms": 1000 * statistics.median(disturbed),
        "long_prompt_answered_s": statistics.median(first),
    }


MEASURES: dict[str, Callable[[Pack, int], dict[str, Any]]] = {
    measure.__name__: measure
    for measure in (
        overhead,
        throughput,
        isolation,
        queue,
        leaving,
        killed,
        memory,
        openapi,
        batch,
        long_prompt,
    )
}


@click.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(MEASURES)))
@click.option("--pack", "-p", default=loramix.DEFAULT, show_default=True)
@click.option(
    "--rounds", default=5, show_default=True, help="Number of rounds; 5 for the complete measurement."
)
def main(names: Sequence[str], pack: str, rounds: int) -> None:
    """Measure NAMES."""
    loaded = Pack.load(pack)
    for name in names:
        click.echo(json.dumps({name: MEASURES[name](loaded, rounds)}))


if __name__ == "__main__":
    main()
