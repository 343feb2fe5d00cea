"""Helpers for benchmarks of the server: requests, and concurrent clients."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from loramix.pack.pack import Pack

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # serve.py also imports from there
from serving import Served

CHAT = "/v1/chat/completions"
Body = dict[str, Any]


def bodies(pack: Pack, skills: Sequence[str], count: int, **options: Any) -> list[Body]:
    """Build requests to skills in turn, each with the skill's example and a number; ``base`` is the bare base."""
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
    """Return the skills with the longest answers."""
    return [skill.name for skill in sorted(pack.skills, key=lambda skill: -skill.max_tokens)][:count]


def connect(server: Served, connections: int = 1) -> httpx.Client:
    """Create a client without certificates, because loading them takes longer than a measured request."""
    limits = httpx.Limits(max_connections=connections)
    return httpx.Client(base_url=server.url, timeout=600, limits=limits, verify=False)


def pieces(client: httpx.Client, body: Body) -> Iterator[tuple[float, dict[str, Any]]]:
    """Stream an answer: yield seconds since the request, and the chunk."""
    began = time.perf_counter()
    with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield time.perf_counter() - began, json.loads(line.removeprefix("data: "))


def first_text(client: httpx.Client, body: Body) -> float:
    """Return the seconds to the first text."""
    found = [at for at, chunk in pieces(client, body) if chunk["choices"][0]["delta"].get("content")]
    return found[0]


def ask(client: httpx.Client, body: Body) -> dict[str, Any]:
    """Return a complete answer; retry if the server is busy."""
    while (answer := client.post(CHAT, json=body)).status_code in (429, 503):
        time.sleep(0.02)
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def many(server: Served, asked: Sequence[Body], clients: int) -> tuple[list[dict[str, Any]], float]:
    """Send requests from concurrent clients; return all answers and the seconds."""
    began = time.perf_counter()
    with connect(server, clients) as client, ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(lambda body: ask(client, body), asked))
    return answers, time.perf_counter() - began


def said(answer: dict[str, Any]) -> str:
    """Return an answer's text."""
    return str(answer["choices"][0]["message"]["content"])


def resident(server: Served) -> int:
    """Return the resident memory of the server and its worker, in bytes."""
    pages = [
        int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        for pid in (server.process.pid, *server.workers())
    ]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def files(server: Served) -> int:
    """Count the open files of the server."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
