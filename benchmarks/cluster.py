"""Faults of trainings and servers on a local Ray cluster of two CPUs, on the random base of the tests.

python benchmarks/cluster.py trainings    12 trainings, two at a time, driver killed once; adapters compared
python benchmarks/cluster.py replica      one of two replicas killed under the load of 16 clients
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from ray_processes import descendants, titled
from tiny import write_base, write_pack
from tiny_skill import write_skill

N_SKILLS, N_CLIENTS, LOAD_S = 12, 16, 20.0
RECIPE = """
name = "{name}"
description = "what {name} is"
metrics = ["accuracy"]
labels = ["good", "bad"]
[data]
license = "none"
how = "By hand."
[lora]
r = 2
[training]
epochs = 16
batch_size = 4
evaluate_every = 4
save_every = 2
dev_rows = 4
[instructions]
any = ["{name} of {{input}}?", "{{input}} {name}"]
"""


def trainings(directory: Path) -> dict[str, Any]:
    """Train twelve skills on a cluster whose driver is killed, and one by one; compare the adapters."""
    base, words = write_base(directory / "tiny.gguf"), []
    for name in (f"skill{i:02}" for i in range(N_SKILLS)):
        words += ["--skill", str(write_skill(directory, name, RECIPE))]

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "loramix",
            "train",
            "pack",
            str(directory / out / "pack"),
            "--no-gate",
        ]
        command += ["--data-dir", str(directory), "--base", str(base), "--out", str(directory / out / "runs")]
        return subprocess.Popen([*command, *words, *more], env={**os.environ, "OMP_NUM_THREADS": "1"})

    def done(out: str) -> int:
        return len(list((directory / out / "runs").glob("*/done.json")))

    began = time.monotonic()
    driver = start("cluster", "--ray", "--workers", "2")
    while done("cluster") < N_SKILLS // 3 and driver.poll() is None:
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    killed_at = done("cluster")
    assert start("cluster", "--ray", "--workers", "2").wait() == 0
    middle = time.monotonic()
    assert start("alone").wait() == 0
    found = [
        {path.name: path.read_bytes() for path in (directory / out / "pack" / "skills").glob("*.gguf")}
        for out in ("cluster", "alone")
    ]
    equal = sum(found[0].get(name) == content for name, content in found[1].items())
    return {
        "adapters": len(found[1]),
        "equal": equal,
        "done_at_kill": killed_at,
        "cluster_s": round(middle - began, 1),
        "one_by_one_s": round(time.monotonic() - middle, 1),
    }


def replica(directory: Path) -> dict[str, Any]:
    """Kill one of two replicas while 16 clients ask, and say which requests failed."""
    os.environ["LORAMIX_EXTRA_BUFTS"] = "0"
    from ray import serve

    from loramix.cluster.serving import NAME, ServeOptions, deployed
    from loramix.cluster.session import session
    from loramix.server.access import AccessPolicy

    pack = write_pack(directory / "packs" / "tiny", write_base(directory / "tiny.gguf"))
    options = ServeOptions(pack=str(pack), min_workers=2, workers=2, ctx=512)
    with (
        session(num_cpus=2),
        deployed(options, AccessPolicy(), host="127.0.0.1", port=0) as url,
        httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=64)) as client,
    ):

        def states() -> list[str]:
            replicas = serve.status().applications[NAME].deployments[NAME].replica_states
            return [
                f"{state.value if hasattr(state, 'value') else state}={n}"
                for state, n in replicas.items()
                if n
            ]

        return _under_load(client, states)


def _under_load(client: httpx.Client, states: Callable[[], list[str]]) -> dict[str, Any]:
    stop, requests, health = threading.Event(), [], []
    body = {"model": "tiny:base", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 100}

    def ask(i: int) -> None:
        number = 0
        while not stop.is_set():
            began, number = time.monotonic(), number + 1
            try:
                more = {"temperature": 2, "seed": 1000 * i + number}
                found = str(client.post("/v1/chat/completions", json={**body, **more}).status_code)
            except httpx.HTTPError as error:
                found = type(error).__name__
            requests.append((began, time.monotonic(), found))

    def watch() -> None:
        while not stop.wait(0.1):
            began = time.monotonic()
            try:
                found = str(client.get("/health").status_code)
            except httpx.HTTPError as error:
                found = type(error).__name__
            health.append((began, time.monotonic(), found))

    with ThreadPoolExecutor(N_CLIENTS + 1) as pool:
        pool.submit(watch)
        for i in range(N_CLIENTS):
            pool.submit(ask, i)
        time.sleep(LOAD_S / 4)
        killed = time.monotonic()
        os.kill(titled("ray::ServeReplica")[0], signal.SIGKILL)
        while states() == ["RUNNING=2"]:  # until Serve has noticed
            time.sleep(0.05)
        while states() != ["RUNNING=2"]:
            time.sleep(0.05)
        back, cpu_s = time.monotonic(), _cpu_seconds(max(titled("ray::ServeReplica")))
        time.sleep(LOAD_S / 4)
        stop.set()
    failed = [one for one in requests if one[2] != "200"]
    return {
        "requests": len(requests),
        "in_flight": sum(began < killed < ended for began, ended, _ in requests),
        "failed": sorted(found for _, _, found in failed),
        "failed_begun_later": sum(began > killed for began, _, _ in failed),
        "back_s": round(back - killed, 1),
        "start_cpu_s": round(cpu_s, 1),
        "health": len(health),
        "health_failed": [found for _, _, found in health if found != "200"],
        "health_slowest_s": round(max(ended - began for began, ended, _ in health), 2),
    }


def _cpu_seconds(pid: int) -> float:
    """CPU time that a replica and its worker process have used."""
    fields = [
        Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in (pid, *descendants(pid))
    ]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps({"trainings": trainings, "replica": replica}[sys.argv[1]](Path(place)), indent=1))
