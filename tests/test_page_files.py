"""The page's files: what they may load, who may ask, their colours; no browser needed."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
from serving import Served

from loramix.commands.explain_report import COLOURS
from loramix.defaults import DEFAULT_POLICY, POLICIES
from loramix.server.access import AccessPolicy
from loramix.server.guard import Guard

WEB = Path(__file__).parent.parent / "loramix" / "server" / "web"


def test_the_page_may_load_nothing_from_elsewhere(page_server: Served) -> None:
    answer = page_server.http.get("/", headers={"Accept": "text/html,*/*;q=0.8"})
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and policy.startswith("default-src 'self';")
    assert "unsafe" not in policy and "require-trusted-types-for 'script'" in policy
    for file in WEB.iterdir():
        text = file.read_text(encoding="utf-8")
        assert page_server.http.get(f"/{file.name}").headers["content-security-policy"] == policy
        outside = re.findall(r"https?://[^\s\"']+", text)
        assert outside in ([], ["http://www.w3.org/2000/svg"]), file.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bstyle=|\son\w+=", text
        ), file.name
        assert text.count("\n") <= 300, file.name
    assert page_server.http.get("/%2e%2e/server.py").status_code == 404


def test_the_page_has_a_button_for_each_policy() -> None:
    text = (WEB / "index.html").read_text(encoding="utf-8")
    buttons = re.findall(r'name="policy" value="(\w+)"( checked)?><span>(\w+)</span>', text)
    assert sorted(value for value, _, _ in buttons) == sorted(POLICIES)
    assert all(value == label for value, _, label in buttons)
    assert [value for value, checked, _ in buttons if checked] == [DEFAULT_POLICY]


def test_a_page_of_this_server_may_ask_under_any_of_its_names() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def status(host: str, origin: str) -> int:
        guard: Any = Guard(app, AccessPolicy(hosts=frozenset({"box.example"})))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as client:
            headers = {"Host": host, "Origin": origin}
            return (await client.post("http://box.example/v1/route", json={}, headers=headers)).status_code

    for host, origin, wanted in (
        ("box.example:1", "http://box.example:1", 200),
        ("box.example", "https://box.example", 200),
        ("box.example:1", "http://box.example:2", 403),
        ("box.example:1", "http://other.example:1", 403),
        ("other.example:1", "http://other.example:1", 403),
        ("box.example:1", "null", 403),
    ):
        assert asyncio.run(status(host, origin)) == wanted, (host, origin)


def test_its_colours_are_those_of_explain() -> None:
    style = (WEB / "style.css").read_text(encoding="utf-8")
    assert tuple(re.findall(r"--skill-\d: (#\w+);", style)) == COLOURS
