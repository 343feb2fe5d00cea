"""The server as two replicas behind Ray Serve's proxy: packs, a dead replica, reloading, draining."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from ray_processes import libraries, titled
from serving import ASK, PATIENCE_S, wait_until

from loramix import Engine
from loramix.cluster.replica import pack_of
from loramix.cluster.serving import NAME, ServeOptions, app, deployed
from loramix.errors import UsageError
from loramix.pack.manifest import read_manifest, write_manifest
from loramix.server.access import AccessPolicy

KEY = "a-key-of-this-test-alone"
SCHEMA = {"name": "long", "schema": {"type": "string", "minLength": 2000}}
LONG = {
    "messages": [ASK],
    "max_tokens": 400,
    "temperature": 2,
    "seed": 1,
    "stream": True,
    "response_format": {"type": "json_schema", "json_schema": SCHEMA},
}
"""All 400 tokens on any CPU."""


@pytest.fixture(scope="module")
def packs(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pack, and a copy of another name."""
    found = {}
    for name in ("tiny", "other"):
        pack = Path(shutil.copytree(tiny_pack, tmp_path_factory.mktemp("served") / name))
        write_manifest(pack, msgspec.structs.replace(read_manifest(pack), name=name))
        found[name] = pack
    return found


@pytest.fixture(scope="module")
def client(ray_cluster: None, packs: dict[str, Path]) -> Iterator[httpx.Client]:
    """A client with the key."""
    options = ServeOptions(
        pack=str(packs["tiny"]),
        also=(str(packs["other"]),),
        min_workers=2,
        workers=2,
        ctx=512,
        parallel=16,  # all streams of a test at once, however they are spread
        cells=16 * 512,
    )
    with (
        deployed(options, AccessPolicy(api_key=KEY), host="127.0.0.1", port=0) as url,
        httpx.Client(base_url=url, timeout=PATIENCE_S, headers={"Authorization": f"Bearer {KEY}"}) as found,
    ):
        yield found


def chat(client: httpx.Client, model: str, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": model, "messages": [ASK], **body})


def read_stream(client: httpx.Client, begun: threading.Barrier | None = None) -> str:
    """Read a long stream; wait at a barrier when it has begun. Returns its last event, or the name of an error."""
    last = ""
    try:
        body = {"model": "tiny:base", **LONG}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if begun is not None:
                    begun.wait(PATIENCE_S)
                    begun = None
                last = line or last
    except httpx.HTTPError as error:
        return type(error).__name__
    return last


def test_the_endpoints_and_both_packs(client: httpx.Client, packs: dict[str, Path]) -> None:
    with Engine.open(packs["tiny"], n_ctx=512, n_threads=1) as engine:
        text = engine.generate(ASK["content"], mix="sentiment", max_tokens=8).text
    for pack in packs:
        answer = chat(client, f"{pack}:sentiment", max_tokens=8)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == text
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert {"tiny", "tiny:base", "other", "other:summarize"} <= set(models)
    refused = chat(client, "third")
    assert refused.status_code == 404 and "other:base" in refused.json()["error"]["message"]
    assert chat(client, "other:none").status_code == 404
    assert client.get("/health").json()["status"] == "ok"
    assert b"loramix_requests_total" in client.get("/metrics").content
    assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403


def test_a_reload_reaches_all_replicas(client: httpx.Client, packs: dict[str, Path]) -> None:
    manifest = read_manifest(packs["tiny"])
    write_manifest(packs["tiny"], msgspec.structs.replace(manifest, description="a new description"))
    assert client.post("/v1/packs/tiny/reload").status_code == 200
    described = {client.get("/v1/packs").json()["data"][0]["description"] for _ in range(20)}
    assert described == {"a new description"}


def test_a_dead_replica_costs_only_its_own_requests(client: httpx.Client) -> None:
    before = titled("ray::ServeReplica")
    assert len(before) == 2 and not any("torch" in libraries(pid) for pid in before)
    begun, health, stop = threading.Barrier(17), [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            health.append(client.get("/health").status_code)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            streams = [pool.submit(read_stream, client, begun) for _ in range(16)]
            begun.wait(PATIENCE_S)
            os.kill(before[0], signal.SIGKILL)
            ends = [stream.result() for stream in streams]
            later = [pool.submit(chat, client, "tiny:base", max_tokens=4) for _ in range(16)]
            assert {answer.result().status_code for answer in later} == {200}
        assert 0 < ends.count("data: [DONE]") < 16, ends
        wait_until(lambda: len(titled("ray::ServeReplica")) == 2)
    finally:
        stop.set()
        watcher.join()
    assert health.count(200) >= len(health) - 1  # one may have been at the replica


def test_stopping_waits_for_answers(client: httpx.Client) -> None:
    from ray import serve

    begun = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read_stream, client, begun)
        begun.wait(PATIENCE_S)
        serve.delete(NAME)
        assert stream.result() == "data: [DONE]"
    assert client.get("/health").status_code in (404, 503)


def scope(path: str, **headers: str) -> dict[str, Any]:
    return {"path": path, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}


def test_the_pack_of_a_request() -> None:
    chat = "/v1/chat/completions"
    assert pack_of(scope(chat), json.dumps({"model": "law:base", "n": 1}).encode()) == "law"
    assert pack_of(scope("/api/show"), b'{"name": "law:latest"}') == "law"
    assert pack_of(scope("/v1/packs/law/reload"), b"") == "law"
    assert pack_of(scope("/v1/route", serve_multiplexed_model_id="law"), b'{"prompt": "x"}') == "law"
    assert pack_of(scope(chat), b'{"model": 3}') == "completions"
    assert pack_of(scope("/health"), b"") == ""


def test_arguments_of_serve_run(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'loramix[ray]'")
    monkeypatch.setenv("LORAMIX_API_KEY", KEY)
    built = app({"pack": str(tiny_pack), "workers": "3", "ctx": "256"})
    deployment = built._bound_deployment
    assert deployment.name == NAME and deployment._deployment_config.autoscaling_config.max_replicas == 3
    assert deployment.init_args[1].api_key == KEY and deployment.init_args[0][0].settings.n_ctx == 256
    with pytest.raises(UsageError, match="worker"):
        app({"pack": str(tiny_pack), "worker": 3})
    with pytest.raises(UsageError, match="named alike"):
        app({"pack": str(tiny_pack), "also": [str(tiny_pack)]})
