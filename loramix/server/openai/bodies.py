"""Request bodies of the OpenAI protocol: each field with its bounds, or with the reason why it is refused.

Fields of other servers that would change an answer are refused; unknown fields are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from loramix.defaults import DEFAULT_POLICY
from loramix.errors import UsageError
from loramix.runtime.sampling import Sampling
from loramix.server.body_types import (
    Dimensions,
    Flag,
    Limit,
    Model,
    NumPredict,
    RepeatPenalty,
    SamplerSettings,
    Text,
    Texts,
    TopLogprobs,
    sampling_of,
)
from loramix.server.chat_messages import Messages
from loramix.server.fields import Body, Refusal, must_be
from loramix.server.service import LoramixField, Name, PolicyName

MAX_CHOICES = 8
NO_TOOLS = (
    "requests tools, which these models cannot call; "
    "switch tools off in the client (Open WebUI: set Function Calling to Legacy)"
)
NO_BIAS = Refusal("is not supported here; leave it out.")
NO_LOGPROBS = Refusal("needs 'logprobs': true; set it, or leave it out.", (0,), ("logprobs", True))
OTHERS = {
    name: Refusal("is not supported here; leave it out.")
    for name in (
        "allowed_token_ids",
        "bad_words",
        "chat_template",
        "continue_final_message",
        "documents",
        "ebnf",
        "echo",
        "grammar",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "ignore_eos",
        "include_stop_str_in_output",
        "json_schema",
        "logits_processors",
        "lora",
        "lora_path",
        "prompt_logprobs",
        "regex",
        "samplers",
        "stop_token_ids",
        "structured_outputs",
        "truncate_prompt_tokens",
        "use_beam_search",
        "watermark",
    )
} | {
    "add_generation_prompt": Refusal("is not supported here; leave it out.", (True,)),
    "chat_template_kwargs": Refusal(
        "is not supported here; leave it out.", ({}, {"enable_thinking": False}, {"thinking": False})
    ),
    "skip_special_tokens": Refusal("is not supported here; leave it out.", (True,)),
}
"""Fields of other servers that would change an answer."""
TUNING = {
    "best_of": Refusal("is not supported here; use 'n', and leave it out.", (1,)),
    "dry_multiplier": Refusal("is not supported here; use 'repeat_penalty', and leave it out.", (0,)),
    "dynatemp_range": Refusal("is not supported here; leave it out.", (0,)),
    "epsilon_cutoff": Refusal("is not supported here; use 'min_p', and leave it out.", (0,)),
    "eta_cutoff": Refusal("is not supported here; use 'min_p', and leave it out.", (0,)),
    "length_penalty": Refusal("is not supported here; leave it out.", (1,)),
    "min_tokens": Refusal("is not supported here; leave it out.", (0,)),
    "mirostat": Refusal("is not supported here; use 'top_p' or 'min_p', and leave it out.", (0,)),
    "mirostat_mode": Refusal("is not supported here; use 'top_p' or 'min_p', and leave it out.", (0,)),
    "n_predict": Refusal("is not known here; use 'max_tokens'.", (-1,)),
    "smoothing_factor": Refusal("is not supported here; leave it out.", (0,)),
    "tfs_z": Refusal("is not supported here; use 'top_p' or 'min_p', and leave it out.", (1,)),
    "top_a": Refusal("is not supported here; use 'min_p', and leave it out.", (0,)),
    "top_n_sigma": Refusal("is not supported here; use 'min_p', and leave it out.", (0, -1)),
    "typ_p": Refusal("is not supported here; use 'top_p' or 'min_p', and leave it out.", (1,)),
    "typical_p": Refusal("is not supported here; use 'top_p' or 'min_p', and leave it out.", (1,)),
    "xtc_probability": Refusal("is not supported here; leave it out.", (0,)),
}

ELSEWHERE = {
    "format": Refusal("is not known here; use 'response_format'."),
    "max_new_tokens": Refusal("is not known here; use 'max_tokens'."),
    "max_output_tokens": Refusal("is not known here; use 'max_tokens'."),
    "options": Refusal("is not known here; send its settings at the top level of the body."),
    "penalty_last_n": Refusal("is not known here; use 'repeat_last_n'."),
    "random_seed": Refusal("is not known here; use 'seed'."),
    "stop_sequences": Refusal("is not known here; use 'stop'."),
    "system": Refusal("is not known here; send a message of role 'system' to /v1/chat/completions."),
}
"""Names that other protocols give to fields that are honoured here."""


class JsonSchema(Body):
    """A JSON schema with a name."""

    ignored: ClassVar[frozenset[str]] = frozenset({"description", "strict"})
    name: Annotated[Name | None, must_be("a name of at most 200 characters")] = None
    schema_: Annotated[dict[str, Any], must_be("a JSON schema")] = Field(alias="schema")


class ResponseFormat(Body):
    """Required format of the answer."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"], must_be('"text", "json_object" or "json_schema"')
    ]
    json_schema: Annotated[JsonSchema | None, must_be("an object with name and schema")] = None

    def schema_for_grammar(self) -> dict[str, Any] | None:
        """Return the JSON schema for the answer, if any."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise UsageError(
                    "response_format.json_schema is missing; it must be an object with a schema."
                )
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Body):
    """Options of a streamed response."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    include_usage: Flag = False


class Sampled(SamplerSettings):
    """Fields shared by chat and completions."""

    ignored: ClassVar[frozenset[str]] = frozenset({"user"})
    refusals: ClassVar = {
        **OTHERS,
        **TUNING,
        **ELSEWHERE,
        "logit_bias": NO_BIAS,
    }
    model: Model
    stream: Flag = False
    stream_options: Annotated[StreamOptions | None, must_be("an object with include_usage")] = None
    max_tokens: Limit | None = None
    temperature: Annotated[float, must_be("a number from 0 to 2", ge=0, le=2, allow_inf_nan=False)] | None = (
        None
    )
    n: Annotated[int, must_be(f"a whole number from 1 to {MAX_CHOICES}", ge=1, le=MAX_CHOICES)] | None = None
    num_predict: NumPredict | None = None
    repetition_penalty: RepeatPenalty | None = None
    loramix: LoramixField = None

    def sampling(self, choice: int) -> Sampling:
        """Return the sampling settings for one of ``n`` choices."""
        found: dict[str, Any] = dict(sampling_of(self, choice))
        if self.repetition_penalty is not None:
            found.setdefault("repeat_penalty", self.repetition_penalty)
        return Sampling(**found)

    @property
    def limit(self) -> int | None:
        """Requested limit of the answer in tokens; Ollama's ``num_predict`` counts where no other is given."""
        return self.num_predict if self.max_tokens is None else self.max_tokens


class ChatBody(Sampled):
    """Body of ``/v1/chat/completions``."""

    ignored: ClassVar[frozenset[str]] = Sampled.ignored | {
        "function_call",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "tool_choice",
        "verbosity",
    }
    refusals: ClassVar = {
        **Sampled.refusals,
        "tools": Refusal(f"{NO_TOOLS}, or send 'tool_choice': 'none'.", ([],), ("tool_choice", "none")),
        "functions": Refusal(
            f"{NO_TOOLS}, or send 'function_call': 'none'.", ([],), ("function_call", "none")
        ),
        "audio": Refusal("requests audio, and answers are text; leave it out.", ({},)),
        "modalities": Refusal("requests more than text; leave it out.", ([], ["text"])),
        "top_logprobs": NO_LOGPROBS,
        "web_search_options": Refusal("requests a web search, which is not supported; leave it out."),
    }
    messages: Messages
    max_completion_tokens: Limit | None = None
    logprobs: Flag | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: Annotated[ResponseFormat | None, must_be("an object with type")] = None

    @property
    def limit(self) -> int | None:
        """Requested limit of the answer in tokens; ``max_completion_tokens`` takes precedence."""
        return super().limit if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(Sampled):
    """Body of ``/v1/completions``; the prompt is sent as a user message, the form that skills are trained on."""

    refusals: ClassVar = {
        **Sampled.refusals,
        "max_completion_tokens": Refusal("is not known here; use 'max_tokens'."),
        "response_format": Refusal(
            "is not supported here; use /v1/chat/completions.", ({}, {"type": "text"})
        ),
        "suffix": Refusal("is not supported here; leave it out."),
    }
    prompt: Texts
    logprobs: Annotated[int, must_be("a whole number from 0 to 5", ge=0, le=5)] | None = None


VECTORS = {
    "embedding_types": Refusal("is not supported here; leave it out.", ([], ["float"])),
    "normalize": Refusal("is not supported here: vectors always have length 1; leave it out.", (True,)),
    "output_dimension": Refusal("is not known here; use 'dimensions'."),
    "output_dtype": Refusal("is not supported here; leave it out.", ("float",)),
    "pooling": Refusal("is not supported here; leave it out.", ("mean",)),
    "truncate_prompt_tokens": Refusal("is not supported here; shorten the text."),
}
"""Fields of other servers that would change a vector."""


class EmbeddingBody(Body):
    """Body of ``/v1/embeddings``."""

    ignored: ClassVar[frozenset[str]] = frozenset({"input_type", "user"})
    refusals: ClassVar = VECTORS
    model: Model
    input: Texts
    encoding_format: Annotated[Literal["float", "base64"], must_be('"float" or "base64"')] = "float"
    dimensions: Dimensions | None = None


class RouteBody(Body):
    """Body of ``/v1/route``: a prompt, or messages."""

    model: Model | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    policy: PolicyName = DEFAULT_POLICY
