"""Who may ask, from where, and with what: cases S1 to S4, and bodies before any parser."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from loramix.cli import main
from loramix.errors import UsageError
from loramix.server.access import AccessPolicy
from loramix.server.guard import MAX_BODY, Guard, Refusal, check_json

KEY = "0123456789abcdef-right"
JSON = {"content-type": "application/json"}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(
    policy: AccessPolicy, method: str = "GET", path: str = "/v1/models", **options: Any
) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=Guard(echo, policy))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:11435", 200),
        ("[::1]", 200),
        ("[::1]:11435", 200),
        ("box.lan", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.", 403),
        (".", 403),
        ("", 403),
        ("127.0.0.1:80@evil.example", 403),
        ("127.0.0.1:", 200),
        ("[::1", 403),
        ("[::1]evil.example", 403),
        ("localhost:port", 403),
        ("192.168.1.7", 403),
    ],
)
def test_hosts(host: str, status: int) -> None:
    policy = AccessPolicy(hosts=frozenset({"box.lan"}))
    assert ask(policy, headers={"host": host}).status_code == status


def test_two_hosts_are_none() -> None:
    headers = [("host", "localhost"), ("host", "evil.example")]
    assert ask(AccessPolicy(), headers=headers).status_code == 403


def test_an_address_names_a_server_that_listens_on_all() -> None:
    policy = AccessPolicy(api_key=KEY, any_address=True)
    headers = {"authorization": f"Bearer {KEY}"}
    assert ask(policy, headers={"host": "192.168.1.7:11435", **headers}).status_code == 200
    assert ask(policy, headers={"host": "evil.example", **headers}).status_code == 403


@pytest.mark.parametrize(
    "origin, allowed",
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://[::1]:8443", True),
        ("https://chat.example", True),
        ("https://chat.example.evil", False),
        ("http://chat.example", False),
        ("http://localhost.evil.example", False),
        ("http://localhost@evil.example", False),
        ("http://evil.example/http://localhost", False),
        ("null", False),
        ("file://localhost", False),
        ("*", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_origins(origin: str, allowed: bool) -> None:
    policy = AccessPolicy(origins=frozenset({"https://chat.example"}), api_key=KEY)
    asked = {"origin": origin, "access-control-request-method": "POST"}
    preflight = ask(policy, "OPTIONS", "/v1/chat/completions", headers=asked)
    assert preflight.status_code == (204 if allowed else 403)
    assert preflight.headers.get("access-control-allow-origin") == (origin if allowed else None)
    assert "access-control-allow-credentials" not in preflight.headers
    answer = ask(policy, headers={"origin": origin, "authorization": f"Bearer {KEY}"})
    assert answer.status_code == (200 if allowed else 403)
    assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)


@pytest.mark.parametrize(
    "header, status",
    [
        (None, 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        ("Bearer ", 401),
        ("Bearer \xff", 401),
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
    ],
)
def test_keys(header: str | None, status: int) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/api/tags", "/metrics", "/openapi.json"):
        answer = ask(AccessPolicy(api_key=KEY), path=path, headers=headers)
        assert answer.status_code == status
        assert KEY not in answer.text
    assert ask(AccessPolicy(api_key=KEY), path="/health", headers=headers).status_code == 200


def test_the_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bool] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(True) or real(a, b))
    ask(AccessPolicy(api_key=KEY), headers={"authorization": "Bearer nonsense"})
    assert compared


@pytest.mark.parametrize(
    "kind, body, status",
    [
        ("application/json", b"{}", 200),
        ("application/json; charset=utf-8", b"{}", 200),
        ("text/plain", b"{}", 415),
        ("application/x-www-form-urlencoded", b"{}", 200),  # curl -d
        ("application/x-www-form-urlencoded", b"a=b", 400),
        ("multipart/form-data", b"", 415),
        (None, b"{}", 200),
        (None, b"a", 400),
        (None, b"", 200),
        ("application/json", b"{", 400),
        ("application/json", b'"\xff"', 400),
        ("application/json", b'"\\ud800"', 400),
        ("application/json", b"NaN", 400),
        ("application/json", b"[" * 1000 + b"]" * 1000, 400),
        ("application/json", b"[" * 100_000 + b"]" * 100_000, 400),
        ("application/json", b"[" + b"0," * 200_000 + b"0]", 400),
        ("application/json", b" " * (MAX_BODY + 1), 413),
    ],
)
def test_bodies(kind: str | None, body: bytes, status: int) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = ask(AccessPolicy(), "POST", content=body, headers=headers)
    assert answer.status_code == status
    assert answer.content == body if status == 200 else "message" in answer.json()["error"]


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_pages_must_say_that_they_send_json(kind: str | None) -> None:
    """Else a page could send it without a preflight."""
    headers = {"content-type": kind} if kind else {}
    for page in (
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        assert ask(AccessPolicy(), "POST", content=b"{}", headers={**headers, **page}).status_code == 415
        assert ask(AccessPolicy(), "POST", content=b"{}", headers={**JSON, **page}).status_code == 200


def test_a_body_without_a_length_is_bounded_too() -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 65_536

    assert ask(AccessPolicy(), "POST", content=endless(), headers=JSON).status_code == 413


def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case L7."""
    monkeypatch.setattr("loramix.server.guard.SEND_S", 0.05)
    ended: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append("closed")

    taken: list[Any] = []

    async def send(message: Any) -> None:
        taken.append(message)
        if len(taken) > 3:
            await asyncio.sleep(60)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(endless, AccessPolicy())(scope, asyncio.sleep, send))  # type: ignore[arg-type]
    assert ended == ["closed"] and len(taken) == 4


def test_errors_have_the_form_of_their_clients() -> None:
    ollama = ask(AccessPolicy(), "POST", "/api/chat", content=b"{", headers=JSON).json()
    openai = ask(AccessPolicy(), "POST", "/v1/chat/completions", content=b"{", headers=JSON).json()
    assert ollama == {"error": "the body is not valid JSON."}
    assert openai["error"]["type"] == "invalid_request_error"


def test_a_sane_json_passes() -> None:
    check_json(json.dumps({"messages": [{"content": "é" * 1000, "n": 1e9}] * 100}).encode())
    with pytest.raises(Refusal):
        check_json(b'{"a": ' * 40 + b"1" + b"}" * 40)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "box.lan"])
def test_another_address_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAMIX_API_KEY", raising=False)
    done = CliRunner().invoke(main, ["serve", "--host", host])
    assert done.exit_code == 2 and "needed" in done.output and "LORAMIX_API_KEY" in done.output


def test_a_weak_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from loramix.commands.serve import read_key

    monkeypatch.setenv("LORAMIX_API_KEY", "short")
    with pytest.raises(UsageError, match="16"):
        read_key(None)
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(file) == KEY
    assert CliRunner().invoke(main, ["serve", "--api-key-file", str(tmp_path / "none")]).exit_code == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_body_with_a_byte_order_mark_is_read(encoding: str) -> None:
    """As of ``curl -d @file`` with a file of Notepad or PowerShell."""
    answer = ask(AccessPolicy(), "POST", content='{"é": 1}'.encode(encoding), headers=JSON)
    assert answer.status_code == 200 and answer.content == '{"é": 1}'.encode()
    broken = ask(AccessPolicy(), "POST", content=b"\xff\xfe{", headers=JSON)
    assert broken.status_code == 400 and "not UTF-16" in broken.json()["error"]["message"]


def test_a_compressed_body_is_named() -> None:
    answer = ask(AccessPolicy(), "POST", content=b"\x1f\x8b", headers={**JSON, "content-encoding": "gzip"})
    assert answer.status_code == 415 and "without Content-Encoding" in answer.json()["error"]["message"]
