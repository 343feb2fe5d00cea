"""Request bodies of the Ollama protocol: each field with its bounds, or with the reason why it is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from loramix.server.body_types import (
    Dimensions,
    Flag,
    Model,
    NumPredict,
    SamplerSettings,
    Text,
    Texts,
    TopLogprobs,
    number,
)
from loramix.server.chat_messages import MAX_MESSAGES, ChatMessage
from loramix.server.fields import Body, Refusal, invalid_field, must_be, preview, without_nulls
from loramix.server.openai.bodies import NO_BIAS, NO_LOGPROBS, NO_TOOLS, TUNING
from loramix.server.service import LoramixField


class RunOptions(SamplerSettings):
    """The body's ``options``."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {  # settings of model loading, and parameters of samplers that are refused below
            "embedding_only",
            "f16_kv",
            "logits_all",
            "low_vram",
            "main_gpu",
            "mirostat_eta",
            "mirostat_tau",
            "num_batch",
            "num_ctx",
            "num_gpu",
            "num_keep",
            "num_thread",
            "numa",
            "penalize_newline",
            "use_mlock",
            "use_mmap",
            "vocab_only",
        }
    )
    refusals: ClassVar = {
        **{
            name: TUNING[name]
            for name in ("dry_multiplier", "mirostat", "tfs_z", "typical_p", "xtc_probability")
        },
        "grammar": Refusal("is not supported here; use 'format', and leave it out."),
        "logit_bias": NO_BIAS,
        "repetition_penalty": Refusal("is not known here; use 'repeat_penalty'."),
    }
    num_predict: NumPredict | None = None
    temperature: Annotated[float, number("temperature")] | None = None


def _format(value: Any) -> Any:
    if value in ("", "json") or isinstance(value, dict):
        return value
    raise invalid_field(f'is {preview(value)}; it must be "json" or a JSON schema.')


LIMITS = ("max_completion_tokens", "max_tokens")
"""OpenAI's names of ``num_predict``; the first one given is used."""
SETTINGS = frozenset(RunOptions.model_fields) | RunOptions.refusals.keys() | set(LIMITS)
"""Fields of ``options`` that a body may also hold at its top level."""


class Generated(Body):
    """Fields shared by chat and generate; settings at the top level count unless ``options`` holds the same."""

    # a prompt that is too long is always refused, never truncated
    ignored: ClassVar[frozenset[str]] = frozenset({"keep_alive", "shift", "truncate"})
    refusals: ClassVar = {
        "n": Refusal("is not supported here; use /v1/chat/completions.", (1,)),
        "response_format": Refusal("is not known here; use 'format'.", ({}, {"type": "text"})),
        "think": Refusal("requests reasoning, which these models do not have; leave it out."),
        "top_logprobs": NO_LOGPROBS,
    }
    model: Model
    stream: Flag = True
    format: Annotated[Any, BeforeValidator(_format), must_be('"json" or a JSON schema')] = None
    options: Annotated[RunOptions, must_be("an object with settings")] = RunOptions()
    logprobs: Flag = False
    top_logprobs: TopLogprobs = 0
    loramix: LoramixField = None

    @model_validator(mode="before")
    @classmethod
    def _move_settings(cls, value: Any) -> Any:
        """Move settings at the top level into ``options``, where Ollama has them; OpenAI's limit is ``num_predict``."""
        if not isinstance(value, dict) or not isinstance(value.get("options"), dict | None):
            return value
        kept = without_nulls(value)
        moved = {name: kept.pop(name) for name in SETTINGS if name in kept}
        options = {**moved, **without_nulls(kept.get("options", {}))}
        for name in LIMITS:
            if name in options:
                options.setdefault("num_predict", options.pop(name))
        return {**kept, "options": options}

    def schema_for_grammar(self) -> dict[str, Any] | None:
        """Return the JSON schema for the answer, if any."""
        if isinstance(self.format, dict):
            return self.format
        return {"type": "object"} if self.format == "json" else None


class ChatBody(Generated):
    """Body of ``/api/chat``; an empty list of messages only checks the model."""

    refusals: ClassVar = {
        **Generated.refusals,
        "system": Refusal("is not known here; send a message of role 'system'."),
        "tools": Refusal(f"{NO_TOOLS}.", ([],)),
    }
    messages: Annotated[
        list[ChatMessage], must_be(f"a list of at most {MAX_MESSAGES} messages", max_length=MAX_MESSAGES)
    ] = Field(default=[])


class GenerateBody(Generated):
    """Body of ``/api/generate``; the chat template is always applied, since skills are trained under it."""

    refusals: ClassVar = {
        **Generated.refusals,
        "context": Refusal("is not supported here; send the conversation to /api/chat.", ([],)),
        "images": Refusal("holds images, and only text is supported; leave them out.", ([],)),
        "raw": Refusal("is not supported here: skills are trained under the chat template; leave it out."),
        "suffix": Refusal("is not supported here; leave it out."),
        "template": Refusal("is not supported here: the base's own template is used; leave it out."),
    }
    prompt: Text = ""
    system: Text = ""


class EmbedBody(Body):
    """Body of ``/api/embed``."""

    ignored: ClassVar[frozenset[str]] = frozenset({"keep_alive", "options"})
    model: Model
    input: Texts
    truncate: Flag = True
    dimensions: Dimensions | None = None


class EmbeddingsBody(Body):
    """Body of ``/api/embeddings``."""

    ignored: ClassVar[frozenset[str]] = frozenset({"keep_alive", "options"})
    refusals: ClassVar = {"dimensions": Refusal("is not supported here; use /api/embed.")}
    model: Model
    prompt: Text


class ShowBody(Body):
    """Body of ``/api/show``."""

    ignored: ClassVar[frozenset[str]] = frozenset({"options", "system", "template", "verbose"})
    model: Model | None = None
    name: Model | None = None
