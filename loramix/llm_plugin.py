"""Plugin for the ``llm`` command: packs as models, routed (``loramix``) or one skill (``loramix/sentiment``)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import llm
from pydantic import Field

from loramix import DEFAULT, Engine
from loramix.defaults import BASE, POLICIES
from loramix.pack.pack import list_packs


@cache
def _engine(pack: str) -> Engine:
    return Engine.open(pack)


class Loramix(llm.Model):  # type: ignore[misc]
    """A pack, or one mix of it; the engine opens at the first prompt and stays open."""

    can_stream = True

    class Options(llm.Options):  # type: ignore[misc]
        """Options of `Engine.stream`."""

        policy: str | None = Field(None, description=", ".join(POLICIES))
        mix: str | None = Field(None, description="sentiment=0.7,summarize=0.3")
        max_tokens: int | None = Field(None, description="Longest answer in tokens")
        temperature: float | None = Field(None, description="0 is greedy")
        seed: int | None = Field(None, description="Seed of the random draws")

    def __init__(self, model_id: str, pack: str, mix: str | None = None) -> None:
        self.model_id, self.pack, self.mix = model_id, pack, mix

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Answer the conversation so far; the route is logged."""
        messages = [
            {"role": m.role, "content": "".join(getattr(part, "text", "") for part in m.parts)}
            for m in prompt.messages
        ]
        options = {"mix": self.mix, **prompt.options.model_dump(exclude_none=True)}
        pieces = _engine(self.pack).stream(messages, **options)
        yield from pieces if stream else ["".join(pieces)]
        usage = pieces.answer.usage if pieces.answer else {}
        response.set_usage(input=usage["prompt_tokens"], output=usage["completion_tokens"])
        response.response_json = pieces.route.to_json()


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Register every pack and each of its skills; the default pack is ``loramix``."""
    for name, pack in ((listing.name, listing.pack) for listing in list_packs() if listing.pack):
        top = "loramix" if name == DEFAULT else f"loramix/{name}"
        register(Loramix(top, name))
        for mix in (BASE, *(skill.name for skill in pack.skills)):
            register(Loramix(f"{top}/{mix}", name, mix))
