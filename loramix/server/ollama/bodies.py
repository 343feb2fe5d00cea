"""Bodies that Ollama's clients send: each field with its bounds, or with why it is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from loramix.server.body_types import (
    NO_LIMIT,
    Dimensions,
    Flag,
    Model,
    SamplerSettings,
    Text,
    Texts,
    TopLogprobs,
)
from loramix.server.chat_messages import MAX_MESSAGES, ChatMessage
from loramix.server.fields import Body, Refusal, refused, says, shown
from loramix.server.openai.bodies import NO_BIAS, NO_TOOLS, TUNING
from loramix.server.service import Options


class RunOptions(SamplerSettings):
    """The body's ``options``."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {  # of how Ollama loads a model, or of samplers that are refused below
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
        "logit_bias": NO_BIAS,
    }
    num_predict: (
        Annotated[
            int, says(f"a whole number from -2 to {NO_LIMIT}, 0 and less for no limit", ge=-2, le=NO_LIMIT)
        ]
        | None
    ) = None
    temperature: (
        Annotated[float, says("a number from 0 to 100", ge=0, le=100, allow_inf_nan=False)] | None
    ) = None


def _format(value: Any) -> Any:
    if value in ("", "json") or isinstance(value, dict):
        return value
    raise refused(f'is {shown(value)}; it must be "json" or a JSON schema.')


class Generated(Body):
    """What chat and generate have in common."""

    # a prompt that is too long is refused in any case, never cut
    ignored: ClassVar[frozenset[str]] = frozenset({"keep_alive", "shift", "truncate"})
    refusals: ClassVar = {
        "think": Refusal("asks for thoughts, and these models have none; leave it out."),
    }
    model: Model
    stream: Flag = True
    format: Annotated[Any, BeforeValidator(_format), says('"json" or a JSON schema')] = None
    options: Annotated[RunOptions, says("an object with settings")] = RunOptions()
    logprobs: Flag = False
    top_logprobs: TopLogprobs = 0
    loramix: Annotated[Options | None, says("an object with policy or mix")] = None

    def schema_for_grammar(self) -> dict[str, Any] | None:
        """The schema that the answer must follow, if any."""
        if isinstance(self.format, dict):
            return self.format
        return {"type": "object"} if self.format == "json" else None


class ChatBody(Generated):
    """Body of ``/api/chat``; without messages it loads the model."""

    refusals: ClassVar = {
        **Generated.refusals,
        "tools": Refusal(f"{NO_TOOLS}.", ([],)),
    }
    messages: Annotated[
        list[ChatMessage], says(f"a list of at most {MAX_MESSAGES} messages", max_length=MAX_MESSAGES)
    ] = Field(default=[])


class GenerateBody(Generated):
    """Body of ``/api/generate``; the chat template is always applied, since skills are trained under it."""

    refusals: ClassVar = {
        **Generated.refusals,
        "context": Refusal("is not supported here; send the conversation to /api/chat.", ([],)),
        "images": Refusal("holds images, and only text is read here; leave them out.", ([],)),
        "raw": Refusal("is not supported here: skills are trained under the chat template; leave it out."),
        "suffix": Refusal("is not supported here; leave it out."),
        "template": Refusal("is not supported here: the base's own is used; leave it out."),
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
