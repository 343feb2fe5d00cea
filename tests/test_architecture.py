"""The documentation agrees with the code: navigation, files that are named, layers, and how deep a request goes."""

from __future__ import annotations

import os
import queue
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from test_layers import LAYERS
from test_readme import PAGES, ROOT

from loramix.runtime.llama.context import Context
from loramix.runtime.llama.early_pass import EarlyPass
from loramix.runtime.options import GenerationOptions
from loramix.server import protocol as m
from loramix.server.pipe import Pipe
from loramix.server.worker import Worker

MAX_ROOMS = 8
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(part)]


def test_the_navigation_names_each_page_once() -> None:
    named = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("**/*.md"))


def test_the_index_links_to_each_page() -> None:
    links = {target for target, _ in LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= links


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_files_are_there(page: str) -> None:
    named = set(re.findall(r"`((?:loramix|tests|docs)/[\w./-]+)`", (ROOT / page).read_text(encoding="utf-8")))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_table_of_layers_is_the_tested_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("\n## Layers\n")[2]
    rows = re.findall(r"^\| `([\w.]+)` \|", text.partition("\n## ")[0], re.MULTILINE)
    assert rows == [layer or "loramix" for layer in LAYERS]


def stack(frame: FrameType | None) -> list[str]:
    """Files of the package on the stack, the outermost first; consecutive frames of one file count once."""
    files: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "loramix"):
            name = path.relative_to(ROOT / "loramix").as_posix()
            if files[-1:] != [name]:
                files.append(name)
        frame = frame.f_back
    return files[::-1]


def test_few_rooms_from_worker_to_first_token(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[list[str]] = []
    decode, states = Context.decode, EarlyPass.states

    def read_early(self: EarlyPass, tokens: Any) -> Any:
        stacks.append([*stack(sys._getframe(1)), "runtime/llama/early_pass.py"])
        return states(self, tokens)

    def traced(self: Context, *arguments: Any, **options: Any) -> Any:
        stacks.append([*stack(sys._getframe(1)), "runtime/llama/context.py"])
        return decode(self, *arguments, **options)

    monkeypatch.setattr(Context, "decode", traced)
    monkeypatch.setattr(EarlyPass, "states", read_early)
    read, write = os.pipe()
    try:
        worker = Worker(tiny_engine, Pipe(write), m.Settings(pack="tiny"))
        messages = [{"role": "user", "content": "the quick brown fox"}]
        inbox: queue.SimpleQueue[m.Request | None] = queue.SimpleQueue()
        options = GenerationOptions(mix=None, max_tokens=1)
        inbox.put(m.Answer(number=1, messages=messages, options=options))
        inbox.put(None)
        worker.run(inbox)
    finally:
        os.close(read)
        os.close(write)
    assert any("runtime/routing.py" in files for files in stacks)  # read for the gate
    assert any("runtime/decoder.py" in files for files in stacks)  # and for the answer
    assert max(map(len, stacks)) <= MAX_ROOMS, stacks
