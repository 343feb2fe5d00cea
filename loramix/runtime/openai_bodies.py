"""Bodies that OpenAI's clients send, with a bound on every number, length and list.

Fields that Loramix has no use for are ignored where that changes nothing, and refused where it would.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from loramix.errors import UsageError
from loramix.runtime.service import Name, Options

MAX_CHOICES = 8
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=65_536)]


class Part(BaseModel):
    """A part of a message; of text alone."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=64)]

    def plain(self) -> dict[str, str]:
        """As the engine takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(BaseModel):
    """A schema with its name."""

    name: Name | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_for_grammar(self) -> dict[str, Any] | None:
        """The schema that the answer must follow, if any."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise UsageError("response_format json_schema needs its json_schema.")
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    include_usage: bool = False


class Sampled(BaseModel):
    """What chat and completions have in common."""

    model: Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    loramix: Options | None = None

    def sampling(self, choice: int) -> dict[str, int | float]:
        """Settings of `Sampling` for one of ``n`` choices; greedy where nothing is asked for."""
        found: dict[str, int | float] = {}
        if self.temperature is not None:
            found["temperature"] = self.temperature
        if self.top_p is not None:
            found["top_p"] = self.top_p
        if self.seed is not None:
            found["seed"] = (self.seed + choice) % 2**63
        return found

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(Sampled):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=512)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


class CompletionBody(Sampled):
    """Body of ``/v1/completions``; the prompt is asked as a user's message, which is what skills are trained on."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class EmbeddingBody(BaseModel):
    """Body of ``/v1/embeddings``."""

    model: Name
    input: str | Annotated[list[str], Field(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] = "float"


class RouteBody(BaseModel):
    """Body of ``/v1/route``: a prompt, or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=512)] | None = None
    policy: Literal["top1", "blend", "each", "token", "base"] = "each"
