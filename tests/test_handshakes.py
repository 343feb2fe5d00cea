"""What clients ask before they ask: versions, HEAD, OPTIONS, preflight, models; and options that can match nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from serving import Served
from test_guard import ask

import loramix
from loramix.cli import main
from loramix.errors import UsageError
from loramix.server.access import AccessPolicy, host_of, origin_of

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
GETS = (
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
    "/app.js",
    "/api/ps",
    "/api/tags",
    "/api/version",
    "/v1/models",
    "/v1/models/tiny:base",
    "/v1/packs",
    "/v1/packs/tiny/skills/sentiment",
)


def test_the_version_is_one_that_ollamas_clients_accept(tiny_server: Served) -> None:
    found = tiny_server.http.get("/api/version").json()
    assert found["loramix"] == loramix.__version__
    assert tuple(map(int, found["version"].split("."))) >= (0, 6, 4)


def test_head_is_wherever_get_is(tiny_server: Served) -> None:
    for path in GETS:
        whole = tiny_server.http.get(path, headers=HTML)
        head = tiny_server.http.head(path, headers=HTML)
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"]
    for path, status in (("/v1/models/nobody", 404), ("/v1/chat/completions", 405), ("/api/nothing", 404)):
        assert tiny_server.http.head(path).status_code == tiny_server.http.get(path).status_code == status
    assert tiny_server.http.head("/api/version").headers["content-length"] != "0"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_as_ollamas_documentation_has_it(tiny_server: Served) -> None:
    def curl(*words: str) -> str:
        done = subprocess.run(["curl", "-sS", "--max-time", "60", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert curl("-I", f"{tiny_server.url}/api/version", f"{tiny_server.url}/").count("200 OK") == 2
    body = '{"model": "tiny", "prompt": "a dog", "stream": false, "options": {"num_predict": 1}}'
    assert '"done":true' in curl(f"{tiny_server.url}/api/generate", "-d", body)
    assert "requests tools" in curl(
        f"{tiny_server.url}/api/chat", "-d", '{"model": "tiny", "messages": [], "tools": [{}]}'
    )


def test_the_root_is_ollama_for_programs_and_the_page_for_browsers(tiny_server: Served) -> None:
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json, text/plain"}):
        found = tiny_server.http.get("/", headers=headers)
        assert found.text == "Ollama is running" and found.headers["content-type"].startswith("text/plain")
        assert "Accept" in found.headers["vary"]
    page = tiny_server.http.get("/", headers=HTML)
    assert page.text.startswith("<!doctype html>") and "Accept" in page.headers["vary"]
    assert "content-security-policy" in page.headers


def test_options_are_answered_everywhere(tiny_server: Served) -> None:
    for path in (*GETS, "/v1/chat/completions", "/api/chat", "/api/pull"):
        answer = tiny_server.http.options(path)
        assert answer.status_code == 204 and "POST" in answer.headers["allow"], path


@pytest.mark.parametrize(
    "fields",
    [
        "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count",
        "X-Requested-With, OpenAI-Organization",
        "http-referer,x-title",
    ],
)
def test_a_preflight_allows_what_an_allowed_page_asks_for(fields: str) -> None:
    policy = AccessPolicy(origins=frozenset({"https://chat.example"}))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": fields}
    for origin in ("https://chat.example", "http://localhost:3000"):
        allowed = ask(policy, "OPTIONS", "/api/chat", headers={"origin": origin, **asked})
        assert allowed.status_code == 204 and allowed.headers["access-control-allow-headers"] == fields
        assert allowed.headers["access-control-allow-origin"] == origin
        assert "HEAD" in allowed.headers["access-control-allow-methods"]
    refused = ask(policy, "OPTIONS", "/api/chat", headers={"origin": "https://evil.example", **asked})
    assert refused.status_code == 403 and "access-control-allow-headers" not in refused.headers
    odd = ask(policy, "OPTIONS", headers={"origin": "https://chat.example", **asked,
        "access-control-request-headers": "x-<script>", "access-control-request-private-network": "true"
    })  # fmt: skip
    assert odd.headers["access-control-allow-headers"] == "Authorization, Content-Type"
    assert odd.headers["access-control-allow-private-network"] == "true"


def test_models_are_shown_as_ollamas_clients_want_them(tiny_server: Served, tiny_base: Any) -> None:
    details = {"format": "gguf", "family": "llama", "families": ["llama"], "quantization_level": "F32"}
    for path in ("/api/tags", "/api/ps"):
        for model in tiny_server.http.get(path).json()["models"]:
            assert details.items() <= model["details"].items()
            assert re.fullmatch(r"\d+K|\d+\.\d\dM", model["details"]["parameter_size"])
            assert model["size"] == tiny_base.stat().st_size and re.fullmatch("[0-9a-f]{64}", model["digest"])
    for name in ({"model": "tiny"}, {"name": "tiny:base"}, {"model": "tiny:latest", "verbose": True}):
        shown = tiny_server.post("/api/show", **name).json()
        assert (
            set(shown["capabilities"]) == {"completion", "embedding"}
            and details.items() <= shown["details"].items()
        )
        info = shown["model_info"]
        assert info["general.architecture"] == "llama" and info["general.parameter_count"] > 1000
        assert (info["llama.context_length"], info["llama.embedding_length"]) == (512, 64)
        assert "message" in shown["template"]
    assert tiny_server.post("/api/show", model="tiny:summarize").json()["parameters"] == "num_predict 12"


def test_a_wrong_path_or_method_gets_a_sentence(tiny_server: Served) -> None:
    for method, path, words in (
        ("GET", "/v1/chat/completions", "send POST"),
        ("DELETE", "/v1/models/tiny", "send GET"),
        ("POST", "/api/pull", "there is no POST /api/pull here"),
        ("GET", "/v1/models/org/name", "there is no GET /v1/models/org/name here"),
        ("GET", f"/v1/models/{'x' * 300}", "no model 'xxx"),
    ):
        error = tiny_server.http.request(method, path).json()["error"]
        text = error if path.startswith("/api") else error["message"]
        assert words in text and text.endswith("."), text


@pytest.mark.parametrize(
    "given, origin",
    [
        ("https://x/", "https://x"),
        ("HTTPS://Chat.Example", "https://chat.example"),
        ("https://x:443", "https://x"),
        ("http://x:80/", "http://x"),
        ("http://x:443", "http://x:443"),
        ("http://x:08080", "http://x:8080"),
        ("https://x.", "https://x"),
        ("https://x:", "https://x"),
        (" https://x ", "https://x"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://[2001:DB8:0:0:0:0:0:1]", "http://[2001:db8::1]"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
        ("app://obsidian.md", "app://obsidian.md"),
    ],
)
def test_origins_are_put_into_the_form_of_browsers(given: str, origin: str) -> None:
    assert origin_of(given) == origin
    assert origin_of(origin) == origin
    allowed = AccessPolicy(origins=frozenset({origin_of(given)}))
    assert ask(allowed, headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        "", "x", "x:80", "chat.example/", "*", "https://*", "https://*.example", "null", "https://", "https:///x",
        "//x",         "https://x/y", "https://x?y", "https://x#y", "https://u@x", "https://u:p@x", "https://x:0", "https://x:70000",
        "https://x:port", "https://x y", "https://a,https://b", "https://[::1", "https://::1", "https://[x]",
        "file:///", "https://..", "https://-x", "https://x..y", "https://[fe80::1%25eth0]", "https://256.1.1.1",
    ],
)  # fmt: skip
def test_origins_that_match_no_page_are_refused_at_the_start(given: str) -> None:
    with pytest.raises(UsageError, match="can match no page"):
        origin_of(given)
    done = CliRunner().invoke(main, ["serve", "--allow-origin", given])
    assert done.exit_code == 2 and "--allow-origin" in done.output and "https://chat.example" in done.output


@pytest.mark.parametrize(
    "given, host, header",
    [
        ("name:8080", "name", "name:8080"),
        ("Box.LAN", "box.lan", "BOX.lan"),
        ("box.lan.", "box.lan", "box.lan:11435"),
        ("name:", "name", "name"),
        (" name ", "name", "name"),
        ("[2001:DB8::1]:80", "2001:db8::1", "[2001:db8::1]:80"),
        ("2001:db8:0:0:0:0:0:1", "2001:db8::1", "[2001:DB8:0::1]"),
        ("10.0.0.7:1", "10.0.0.7", "10.0.0.7:11435"),
        ("bücher.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("host_with_line", "host_with_line", "host_with_line"),
    ],
)
def test_hosts_are_put_into_the_form_of_clients(given: str, host: str, header: str) -> None:
    assert host_of(given) == host_of(host) == host
    policy = AccessPolicy(hosts=frozenset({host_of(given)}))
    assert ask(policy, headers={"host": header}).status_code == 200
    assert ask(policy, headers={"host": "other"}).status_code == 403


@pytest.mark.parametrize(
    "given",
    [
        "", ".", "*", "*.lan", "http://x", "x/", "x/y", "a,b", "a b", "x:0", "x:99999", "x:y", "[::1", "[x]", "u@x",
        "fe80::1%eth0", "1.2.3", "1.2.3.4.5", "x..y", "-x", "x" * 64,
    ],
)  # fmt: skip
def test_hosts_that_match_no_header_are_refused_at_the_start(given: str) -> None:
    with pytest.raises(UsageError, match="can match no Host header"):
        host_of(given)
    done = CliRunner().invoke(main, ["serve", "--allow-host", given])
    assert done.exit_code == 2 and "--allow-host" in done.output and "box.lan" in done.output


@pytest.mark.parametrize("option", ["--timeout", "--queue-timeout", "--first-token-timeout"])
def test_seconds_are_a_number(option: str) -> None:
    done = CliRunner().invoke(main, ["serve", option, "nan"])
    assert done.exit_code == 2 and "not a number of seconds" in done.output


def test_the_address_to_listen_on_is_read_as_well_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("loramix.server.app.serve", lambda *_, **options: seen.append(options))
    monkeypatch.delenv("LORAMIX_API_KEY", raising=False)
    for given, host in (("LOCALHOST", "localhost"), ("[::1]", "::1"), ("127.0.0.1", "127.0.0.1")):
        assert CliRunner().invoke(main, ["serve", "--host", given]).exit_code == 0
        assert seen[-1]["host"] == host
    for given in ("http://127.0.0.1", "127.0.0.1:8080", "localhost:1", "*", ""):
        done = CliRunner().invoke(main, ["serve", "--host", given])
        assert done.exit_code == 2 and "--host" in done.output and len(seen) == 3


def test_httpx_follows_no_redirect_for_the_root(tiny_server: Served) -> None:
    """Some clients probe the base URL with and without its last slash."""
    assert httpx.get(tiny_server.url).text == httpx.get(f"{tiny_server.url}/").text == "Ollama is running"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/chat/completions", "send it to /v1/chat/completions."),
        ("/v1/v1/chat/completions", "send it to /v1/chat/completions."),
        ("/generate", "send it to /api/generate."),
        ("/tokenize", "/openapi.json lists the endpoints."),
        ("/", "/openapi.json lists the endpoints."),
    ],
)
def test_a_base_url_with_another_prefix_gets_the_path_that_is_meant(
    tiny_server: Served, path: str, words: str
) -> None:
    answer = tiny_server.post(path, model="tiny", messages=[])
    assert answer.status_code == 404 and answer.json()["error"]["message"].endswith(words)
    assert f"there is no POST {path} here" in answer.text
