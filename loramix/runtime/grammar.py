"""Answers that follow a grammar: a JSON schema → GBNF → llama.cpp's grammar, beside our own sampling.

A schema comes from a stranger: its size and its numbers are bounded, nothing is fetched for it, and the grammar
is only told of tokens that it has allowed, since it ends the process on others.
"""

from __future__ import annotations

import ctypes
import json
import re
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import UsageError
from loramix.runtime.llama import C, Model
from loramix.runtime.sampling import Sampler

MAX_SCHEMA_BYTES = 16_384
MAX_GRAMMAR_BYTES = 131_072
MAX_REPEATS = 500
_BOUNDS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")

_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class GrammarSampler:
    """A sampler that draws only what a grammar allows.

    Args:
        model: whose vocabulary counts.
        grammar: GBNF whose first rule is ``root``.
        sampler: chooses among what is allowed.

    Raises:
        UsageError: llama.cpp cannot read the grammar.
    """

    def __init__(self, model: Model, grammar: str, sampler: Sampler) -> None:
        pointer = C.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
        if not pointer:
            raise UsageError("the grammar of the response format cannot be used; make the schema simpler.")
        self._grammar, self._sampler = pointer, sampler
        self._end = model.eot
        weakref.finalize(self, C.llama_sampler_free, pointer)

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int]) -> int:
        """Draw one token; see `Sampler.pick`."""
        token = self._sampler.pick(logits, recent)
        # one token is looked up in no time, all of them in milliseconds
        if not np.isfinite(self._allowed(np.array([token]), logits[[token]])[0]):
            allowed = self._allowed(np.arange(len(logits)), logits)
            if not np.isfinite(allowed).any():  # nothing fits: better an end than an abort
                return self._end
            token = self._sampler.pick(allowed, recent)
        C.llama_sampler_accept(self._grammar, token)
        return token

    def _allowed(
        self, tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Logits with -inf where the grammar forbids."""
        table = np.zeros(len(tokens), _TOKEN)
        table["id"], table["logit"] = tokens, logits
        data = table.ctypes.data_as(C.llama_token_data_p)
        candidates = C.llama_token_data_array(data=data, size=len(tokens), selected=-1, sorted=False)
        C.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        return table["logit"].copy()


def schema_to_grammar(schema: dict[str, Any]) -> str:
    """GBNF of a JSON schema.

    Args:
        schema: a JSON schema as a client sent it; references may point into itself alone.

    Raises:
        UsageError: too large, with bounds that are, or of a form that llama.cpp's converter does not know.
    """
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise UsageError(f"the JSON schema has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are accepted.")
    for node in _nodes(schema):
        for name in _BOUNDS:
            if name in node and not (
                isinstance(node[name], int)
                and not isinstance(node[name], bool)
                and 0 <= node[name] <= MAX_REPEATS
            ):
                raise UsageError(f"{name} of a JSON schema must be a whole number from 0 to {MAX_REPEATS}.")
        pattern = str(node.get("pattern", ""))
        if any(int(number) > MAX_REPEATS for number in re.findall(r"\d{1,10}", pattern)):
            raise UsageError(f"a pattern of the JSON schema repeats more than {MAX_REPEATS} times.")
        if "$ref" in node and not str(node["$ref"]).startswith("#/"):
            raise UsageError(
                "a $ref of the JSON schema must point into the schema itself, as '#/$defs/NAME'."
            )
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        grammar = json_schema_to_gbnf(text)
    except Exception as error:  # a converter for friendly schemas: a stranger's may raise anything
        raise UsageError(
            f"the JSON schema cannot be used ({type(error).__name__}); make it simpler."
        ) from None
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise UsageError("the JSON schema makes too large a grammar; make it simpler.")
    return str(grammar)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
