"""The constraint of an answer, GBNF or a JSON schema, which creates samplers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramix.errors import UsageError
from loramix.runtime.llama.model import Model
from loramix.runtime.sampling import Picker

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_tokens: weakref.WeakKeyDictionary[Model, LLTokenizer] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Constraint:
    """A grammar that an answer must follow; created by `of`."""

    gbnf: str | None
    rules: str | None
    """A grammar for llguidance."""

    @classmethod
    def of(cls, gbnf: str | None, json_schema: Mapping[str, Any] | bool | None) -> Constraint | None:
        """Create the constraint of a request; None without a grammar and a schema.

        Raises:
            UsageError: both are given, or the schema cannot be enforced; the message has the field's path.
        """
        if gbnf is not None and json_schema is not None:
            raise UsageError("grammar and json_schema exclude each other; give one of them.")
        if json_schema is None:
            return None if gbnf is None else cls(gbnf, None)
        # llguidance takes 0.1 s to import and is rarely needed
        from loramix.runtime.constraints.schema import schema_to_grammar

        return cls(None, schema_to_grammar(json_schema))

    def picker(self, model: Model, sampler: Picker) -> Picker:
        """Create the constrained sampler of one answer; ``sampler`` chooses among the allowed tokens."""
        if self.rules is None:
            from loramix.runtime.constraints.grammar import GrammarSampler

            assert self.gbnf is not None
            return GrammarSampler(model, self.gbnf, sampler)
        from loramix.runtime.constraints.schema_sampler import SchemaSampler, vocabulary

        if model not in _tokens:
            _tokens[model] = vocabulary(model)
        return SchemaSampler(_tokens[model], self.rules, sampler)
