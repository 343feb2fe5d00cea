"""A server in a process of its own, as a user starts it, and small clients for it."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

PATIENCE_S = 300.0
"""Longest wait for an event, which ends with the event: a busy machine takes its time."""
ASK = {"role": "user", "content": "the quick brown fox jumps"}


def wait_until(what: Callable[[], object]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


class Served:
    """A running server.

    Args:
        process: it.
        lines: its log, as it comes.
    """

    def __init__(self, process: subprocess.Popen[str], lines: queue.Queue[str], log: list[str]) -> None:
        self.process, self._lines, self.log = process, lines, log
        self.url = self.wait_for(r"running on (http://\S+)").group(1)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def wait_for(self, pattern: str, seconds: float = PATIENCE_S) -> re.Match[str]:
        """The next line of the log that matches."""
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} in the log: {self.log}") from None
            if found := re.search(pattern, line):
                return found
            if not line:
                raise AssertionError(f"the server ended: {self.log}")

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST JSON."""
        return self.http.post(path, json=body)

    def chat(self, model: str = "tiny", **body: Any) -> httpx.Response:
        """A chat."""
        return self.post("/v1/chat/completions", model=model, **{"messages": [ASK], **body})

    def workers(self) -> list[int]:
        """Processes of the worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in children.split()]


@contextmanager
def served(pack: Path | str, *options: str, **environment: str) -> Iterator[Served]:
    """Start ``loramix serve``, and end it."""
    command = [sys.executable, "-m", "loramix", "serve", "-p", str(pack), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
    )
    lines: queue.Queue[str] = queue.Queue()
    log: list[str] = []

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    server: Served | None = None
    try:
        server = Served(process, lines, log)
        yield server
    finally:
        if server is not None:
            server.http.close()
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        reader.join(PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()


def openapi_cases(url: str, each: int, model: str) -> dict[str, Any]:
    """Send requests that Schemathesis makes from the server's OpenAPI.

    Args:
        url: the server.
        each: requests an endpoint.
        model: put in place of every second one's model, which would not be known.

    Returns:
        How many ``cases`` were sent, how often each of the ``statuses`` came, and ``failures``: those of 500.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    statuses: Counter[int] = Counter()
    failures: list[str] = []
    options = settings(
        max_examples=each,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()

        @options
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body and statuses.total() % 2:
                case.body["model"] = model
            status = case.call(base_url=url).status_code
            statuses[status] += 1
            if status == 500:
                failures.append(case.as_curl_command())

        ask()
    return {"cases": statuses.total(), "statuses": dict(sorted(statuses.items())), "failures": failures}
