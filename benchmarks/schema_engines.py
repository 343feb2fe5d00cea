"""Comparison of engines that constrain an answer to a JSON schema.

    python benchmarks/schema_engines.py --suite JSON-SCHEMA-TEST-SUITE [--out schemas.json]

Compares llama-cpp-python's converter, llguidance unchanged, xgrammar (if it is installed with torch, which it needs)
and Loramix, which parses schemas before llguidance does. Three measures: the JSON-Schema-Test-Suite, the forty
schemas of tests/schemas.py, and time with the default base's vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from schemas import SCHEMAS, validator

from loramix import DEFAULT
from loramix.models import bases
from loramix.paths import write_text
from loramix.runtime.constraints.schema import schema_to_grammar
from loramix.runtime.constraints.schema_sampler import vocabulary
from loramix.runtime.llama.model import C, Model

# remote documents, other dialects, and keywords that are only annotations
NOT_APPLICABLE = {"refRemote", "vocabulary", "dynamicRef", "format", "content", "default"}
WALKS, STEPS = 3, 300
TIMED = ("scalars", "discriminated", "zod strings")
Bools = npt.NDArray[np.bool_]


class Matcher(Protocol):
    """The state of one answer under a schema."""

    def mask(self) -> Bools:
        """Return which tokens are allowed next."""

    def take(self, token: int) -> bool:
        """Append a token; return False if it is not allowed."""


class LlamaCpp:
    """llama-cpp-python's converter and llama.cpp's grammar."""

    def __init__(self, model: Model, schema: Any) -> None:
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        grammar = json_schema_to_gbnf(json.dumps(schema)).encode()
        self._sampler = C.llama_sampler_init_grammar(model.vocab, grammar, b"root")
        if not self._sampler:
            raise ValueError("llama.cpp cannot read the grammar")
        self._n = model.n_vocab

    def _apply(self, tokens: npt.NDArray[np.int64]) -> Bools:
        table = np.zeros(len(tokens), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        table["id"] = tokens
        data = table.ctypes.data_as(C.llama_token_data_p)
        candidates = C.llama_token_data_array(data=data, size=len(tokens), selected=-1, sorted=False)
        C.llama_sampler_apply(self._sampler, ctypes.byref(candidates))
        return np.asarray(np.isfinite(table["logit"]))

    def mask(self) -> Bools:
        return self._apply(np.arange(self._n))

    def take(self, token: int) -> bool:
        if not self._apply(np.array([token]))[0]:
            return False
        C.llama_sampler_accept(self._sampler, token)
        return True


class Guidance:
    """llguidance."""

    def __init__(self, tokens: Any, n_vocab: int, grammar: str) -> None:
        from llguidance import LLMatcher

        self._n, self._matcher = n_vocab, LLMatcher(tokens, grammar, log_level=0)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())

    def mask(self) -> Bools:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._n, bitorder="little").view(bool)

    def take(self, token: int) -> bool:
        return bool(self._matcher.consume_token(token))


class XGrammar:
    """xgrammar, set up as in its documentation for non-strict schemas."""

    def __init__(self, compiler: Any, n_vocab: int, schema: Any) -> None:
        import xgrammar

        self._n = n_vocab
        self._matcher = xgrammar.GrammarMatcher(
            compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        )
        self._bits = xgrammar.allocate_token_bitmask(1, n_vocab)

    def mask(self) -> Bools:
        self._matcher.fill_next_token_bitmask(self._bits)
        bits = self._bits.numpy().view(np.uint8)[0]
        return np.unpackbits(bits, count=self._n, bitorder="little").view(bool)

    def take(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))


def engines(model: Model) -> Iterator[tuple[str, float, Callable[[Any], Matcher]]]:
    """Yield name, start-up seconds with the vocabulary, and a factory of matchers for a schema."""
    yield "llama-cpp-python", 0.0, lambda schema: LlamaCpp(model, schema)
    began = time.perf_counter()
    tokens = vocabulary(model)
    took = time.perf_counter() - began
    n = model.n_vocab

    head = '%llguidance {"no_forcing": true}\nstart: %json '
    yield "llguidance", took, lambda schema: Guidance(tokens, n, head + json.dumps(schema))
    yield "Loramix (llguidance)", took, lambda schema: Guidance(tokens, n, schema_to_grammar(schema))
    try:
        began = time.perf_counter()
        import xgrammar
    except ImportError as error:
        click.echo(f"xgrammar is skipped: {error}", err=True)
        return
    ends = [token for token in range(n) if model.is_end(token)]
    pieces = [model.piece(token) for token in range(n)]
    info = xgrammar.TokenizerInfo(pieces, vocab_size=n, stop_token_ids=ends)
    compiler = xgrammar.GrammarCompiler(info, max_threads=2)
    took = time.perf_counter() - began
    yield "xgrammar", took, lambda schema: XGrammar(compiler, n, schema)


def accepts(model: Model, matcher: Matcher, text: str) -> bool:
    """Whether the matcher accepts a text as an answer."""
    return all(map(matcher.take, model.tokenize(text))) and bool(matcher.mask()[model.eot])


def suite(model: Model, make: Callable[[Any], Matcher], directory: Path) -> dict[str, int]:
    """Count the suite's schemas, the rejected ones, and errors on instances of the others."""
    found: Counter[str] = Counter()
    for path in sorted((directory / "tests" / "draft2020-12").glob("*.json")):
        if path.stem in NOT_APPLICABLE:
            continue
        for group in json.loads(path.read_text(encoding="utf-8")):
            found["schemas"] += 1
            try:
                make(group["schema"])
            except Exception:
                found["refused"] += 1
                continue
            wrong = 0
            for test in group["tests"]:
                text = json.dumps(test["data"], ensure_ascii=False, separators=(",", ":"))
                taken = accepts(model, make(group["schema"]), text)
                found["instances"] += 1
                wrong += taken and not test["valid"]
                found["valid ones not written"] += test["valid"] and not taken
            found["invalid ones written"] += wrong
            found["schemas enforced wrongly"] += wrong > 0
    return dict(found)


def walk(model: Model, matcher: Matcher, rng: random.Random, closing: Bools) -> str | None:
    """Sample an answer at random; None if it does not end."""
    text = b""
    for _ in range(STEPS):
        allowed = matcher.mask()
        if allowed[model.eot] and rng.random() < 0.5:
            return text.decode("utf-8", "replace")
        near = np.flatnonzero(allowed & closing)
        some = near if len(near) and rng.random() < 0.4 else np.flatnonzero(allowed)
        if not len(some):
            return text.decode("utf-8", "replace")
        token = int(rng.choice(some))
        if model.is_end(token):
            return text.decode("utf-8", "replace")
        matcher.take(token)
        text += model.piece(token)
    return None


def forty(model: Model, make: Callable[[Any], Matcher]) -> dict[str, list[str]]:
    """Return the names of the forty schemas by result."""
    closers = {b'"', b"}", b"]", b'"}', b'"]'}
    closing = np.array([model.piece(token) in closers for token in range(model.n_vocab)])
    found: dict[str, list[str]] = {"conform": [], "refused": [], "wrong": [], "no end": []}
    for name, schema in SCHEMAS.items():
        judge, rng, whole, good = validator(schema), random.Random(name), 0, 0
        try:
            for _ in range(WALKS):
                text = walk(model, make(schema), rng, closing)
                if text is not None:
                    whole += 1
                    good += conforms(judge, text)
        except Exception:
            found["refused"].append(name)
            continue
        found["no end" if not whole else "conform" if good == whole else "wrong"].append(name)
    return found


def conforms(judge: Any, text: str) -> bool:
    """Whether a text is JSON that the validator of a schema accepts."""
    try:
        return bool(judge.is_valid(json.loads(text, parse_float=lambda digits: min(1e308, float(digits)))))
    except ValueError:
        return False


def timed(model: Model, make: Callable[[Any], Matcher]) -> dict[str, float]:
    """Measure milliseconds to compile a schema and to compute a token's mask, on texts sampled with Loramix."""
    compiled, tokens = [], []
    for name in TIMED:
        began = time.perf_counter()
        try:
            matcher = make(SCHEMAS[name])
        except Exception:
            continue
        compiled.append(time.perf_counter() - began)
        rng = random.Random(1)
        for _ in range(60):
            began = time.perf_counter()
            allowed = matcher.mask()
            took = time.perf_counter() - began
            token = int(rng.choice(np.flatnonzero(allowed)))
            if model.is_end(token):
                break
            began = time.perf_counter()
            matcher.take(token)
            tokens.append(took + time.perf_counter() - began)
    return {
        "compile ms": 1e3 * statistics.median(compiled),
        "token ms, median": 1e3 * statistics.median(tokens),
        "token ms, highest": 1e3 * max(tokens),
    }


@click.command()
@click.option("--suite", "directory", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(directory: Path, out: Path | None) -> None:
    """Compare the engines."""
    found: dict[str, dict[str, Any]] = {}
    with Model(bases.resolve(DEFAULT), vocab_only=True) as model:
        for name, start, make in engines(model):
            found[name] = {"start s": start, **timed(model, make)}
            found[name] |= {"forty": forty(model, make), "suite": suite(model, make, directory)}
            click.echo(json.dumps({name: found[name]}))
    if out:
        write_text(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
