"""Bodies that Ollama's clients send, with a bound on every number, length and list."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from loramix.runtime.service import Name, Options

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Empty = Annotated[list[Any], Field(max_length=0)]


class RunOptions(BaseModel):
    """The body's ``options``; those that only llama.cpp's other samplers know are ignored."""

    num_predict: Annotated[int, Field(ge=-2, le=65_536)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    repeat_last_n: Annotated[int, Field(ge=0, le=65_536)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None

    def max_tokens(self, n_ctx: int) -> int | None:
        """Longest answer; None for what the skill says; below 0, Ollama's "no limit", the whole context."""
        if self.num_predict is None or self.num_predict == 0:
            return None
        return self.num_predict if self.num_predict > 0 else n_ctx

    def sampling(self) -> dict[str, int | float]:
        """Settings of `Sampling`; greedy where nothing is asked for."""
        names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "seed")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if "seed" in found:
            found["seed"] %= 2**63
        return found

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Generated(BaseModel):
    """What chat and generate have in common."""

    model: Name
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: RunOptions = RunOptions()
    loramix: Options | None = None

    def schema_for_grammar(self) -> dict[str, Any] | None:
        """The schema that the answer must follow, if any."""
        if isinstance(self.format, dict):
            return self.format
        return {"type": "object"} if self.format == "json" else None


class ChatMessage(BaseModel):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: str
    images: Empty | None = None


class ChatBody(Generated):
    """Body of ``/api/chat``."""

    messages: Annotated[list[ChatMessage], Field(max_length=512)] = []
    tools: Empty | None = None


class GenerateBody(Generated):
    """Body of ``/api/generate``; the chat template is always applied, since skills are trained under it."""

    prompt: str = ""
    system: str = ""
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    raw: Literal[False] | None = None
    images: Empty | None = None


class EmbedBody(BaseModel):
    """Body of ``/api/embed``."""

    model: Name
    input: str | Annotated[list[str], Field(min_length=1, max_length=256)]


class EmbeddingsBody(BaseModel):
    """Body of ``/api/embeddings``."""

    model: Name
    prompt: str


class ShowBody(BaseModel):
    """Body of ``/api/show``."""

    model: Name | None = None
    name: Name | None = None
