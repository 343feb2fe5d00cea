"""What the server costs and what it survives; each measure is a command, results are JSON.

    python benchmarks/serve.py overhead|throughput|isolation|queue|leaving|killed|memory|openapi [--pack PACK]

The server runs in a process of its own with its default settings and is asked over loopback. Times want an idle
machine; counts do not.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx

from loramix.pack import Pack

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import Served, openapi_cases, served

CHAT = "/v1/chat/completions"
Body = dict[str, Any]


def bodies(pack: Pack, skills: Sequence[str], count: int, **options: Any) -> list[Body]:
    """Requests to skills in turn, by name, each with its example and a number; ``base`` is the bare base."""
    examples = {skill.name: skill.example or skill.description for skill in pack.skills}
    examples["base"] = "Tell me about the sea."
    return [
        {
            "model": f"{pack.name}:{name}",
            "messages": [{"role": "user", "content": f"{examples[name]} ({number})"}],
            **options,
        }
        for number, name in zip(range(count), itertools.cycle(skills), strict=False)
    ]


def talkers(pack: Pack, count: int) -> list[str]:
    """The skills whose answers may be longest."""
    return [skill.name for skill in sorted(pack.skills, key=lambda skill: -skill.max_tokens)][:count]


def connect(server: Served, connections: int = 1) -> httpx.Client:
    """A client; without certificates, whose reading takes longer than what is measured."""
    limits = httpx.Limits(max_connections=connections)
    return httpx.Client(base_url=server.url, timeout=600, limits=limits, verify=False)


def pieces(client: httpx.Client, body: Body) -> Iterator[tuple[float, dict[str, Any]]]:
    """A streamed answer: seconds since the request, and the chunk."""
    began = time.perf_counter()
    with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield time.perf_counter() - began, json.loads(line.removeprefix("data: "))


def first_text(client: httpx.Client, body: Body) -> float:
    """Seconds to the first text."""
    found = [at for at, chunk in pieces(client, body) if chunk["choices"][0]["delta"].get("content")]
    return found[0]


def ask(client: httpx.Client, body: Body) -> dict[str, Any]:
    """A whole answer; a busy server is asked again."""
    while (answer := client.post(CHAT, json=body)).status_code in (429, 503):
        time.sleep(0.02)
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def many(server: Served, asked: Sequence[Body], clients: int) -> tuple[list[dict[str, Any]], float]:
    """All answers, asked by so many clients at once, and the seconds that it took."""
    began = time.perf_counter()
    with connect(server, clients) as client, ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda body: ask(client, body), asked))
    return answers, time.perf_counter() - began


def said(answer: dict[str, Any]) -> str:
    """An answer's text."""
    return str(answer["choices"][0]["message"]["content"])


def resident(server: Served) -> int:
    """Bytes of memory of the server and its worker."""
    pages = [
        int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        for pid in (server.process.pid, *server.workers())
    ]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def overhead(pack: Pack, rounds: int) -> dict[str, Any]:
    """The same request to an engine in this process and to the server, in turns."""
    from loramix import Engine

    (name,) = talkers(pack, 1)
    later, slower = [], []
    with served(pack.directory) as server, Engine.open(pack.directory, contexts=4) as engine:
        for number, body in enumerate(bodies(pack, [name], rounds + 1, max_tokens=64)):
            began = time.perf_counter()
            stream = engine.stream(body["messages"], mix=name, max_tokens=64)
            direct = [time.perf_counter() - began for _ in stream]
            served_ = [
                at for at, chunk in pieces(server.http, body) if chunk["choices"][0]["delta"].get("content")
            ]
            if number:
                later.append(served_[0] - direct[0])
                slower.append((served_[-1] - served_[0]) / (direct[-1] - direct[0]) - 1)
    return {
        "first_token_ms": 1000 * statistics.median(later),
        "slower_percent": 100 * statistics.median(slower),
        "rounds": rounds,
    }


def throughput(pack: Pack, rounds: int) -> dict[str, Any]:
    """Tokens a second of eight clients against one, on one mix and on four."""
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
    """8 threads, 10 greedy requests each a round, over four mixes, against one by one."""
    asked = bodies(pack, [*talkers(pack, 3), "base"], 20 * rounds, max_tokens=24)
    with served(pack.directory, "--queue", "64") as server:
        alone = [said(answer) for answer in many(server, asked, 1)[0]]
        together = [said(answer) for answer in many(server, asked * 4, 8)[0]]
    equal = sum(a == b for a, b in zip(together, alone * 4, strict=True))
    return {"requests": len(together), "equal": equal}


def queue(pack: Pack, rounds: int) -> dict[str, Any]:
    """64 clients at once on a queue of 16, while somebody asks for /health."""
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
    """Clients that leave after three tokens, then four times as many that leave at once, a request after each."""
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
    """The worker killed four times a round under load, by SIGKILL and by abort."""
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
    """Resident memory and open files after 100 requests over all skills, and after 200 more a round."""
    skills = [*(skill.name for skill in pack.skills), "base"]
    with served(pack.directory, "--queue", "64") as server:
        many(server, bodies(pack, skills, 100, max_tokens=8), 8)
        files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        before = resident(server)
        many(server, bodies(pack, skills, 200 * rounds, max_tokens=8), 8)
        time.sleep(1)
        after = resident(server)
        left = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) - files
    return {
        "mb_before": before / 2**20,
        "mb_after": after / 2**20,
        "grows_percent": 100 * (after / before - 1),
        "files_more": left,
    }


def openapi(pack: Pack, rounds: int) -> dict[str, Any]:
    """Requests that Schemathesis makes, twelve an endpoint and round."""
    with served(pack.directory, "--ctx", "256") as server:
        return openapi_cases(server.url, 12 * rounds, pack.name)


MEASURES: dict[str, Callable[[Pack, int], dict[str, Any]]] = {
    measure.__name__: measure
    for measure in (overhead, throughput, isolation, queue, leaving, killed, memory, openapi)
}


@click.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(MEASURES)))
@click.option("--pack", "-p", default="smollm2-135m", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="5 are the whole measure.")
def main(names: Sequence[str], pack: str, rounds: int) -> None:
    """Measure NAMES."""
    loaded = Pack.load(pack)
    for name in names:
        click.echo(json.dumps({name: MEASURES[name](loaded, rounds)}))


if __name__ == "__main__":
    main()
