"""Measures each skill's contribution to each token, ‖s·BAx‖ / ‖Wx‖, in llama.cpp's graph.

Skills are loaded unfused, so that each product is a node of the graph that llama.cpp's callback can read. X-LoRA
(Buehler & Buehler, arXiv 2402.07148) reports scalings per layer and token; this measures their effect on the
activations.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loramix.defaults import LLAMA_CPP
from loramix.errors import Unsupported
from loramix.models.mixing import Mix
from loramix.runtime.answer import Answer
from loramix.runtime.detokenize import Detokenizer
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import C, ggml

if TYPE_CHECKING:
    from loramix.runtime.engine import Engine

# offsets in struct ggml_tensor of its shape and first operand: 64 bit, in the release of `LLAMA_CPP`
_NE, _SRC = 16, 152
_TARGET = re.compile(r"blk\.(\d+)\.(.+)\.weight(\.lora_b)?\Z")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Contributions:
    """Contributions of an answer's skills at each of its tokens."""

    skills: list[str]
    pieces: list[str]
    """The answer's tokens as text; a character of several tokens belongs to the last of them."""
    mixes: list[Mix]
    """The mix that chose each token."""
    values: Floats
    """(K, L, T) float32: ‖s·BAx‖ / ‖Wx‖ over a layer's adapted matrices, by skill, layer and token."""

    @property
    def strongest(self) -> list[str | None]:
        """The skill that contributes most to each token; None where only the base is active."""
        total = self.values.sum(axis=1)
        return [self.skills[column.argmax()] if column.any() else None for column in total.T]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable form; ``values`` is by skill, layer and token."""
        return {
            "skills": self.skills,
            "tokens": self.pieces,
            "mixes": [str(mix) for mix in self.mixes],
            "strongest": self.strongest,
            "values": {
                name: np.round(values.astype(float), 4).tolist()
                for name, values in zip(self.skills, self.values, strict=True)
            },
        }


def contributions(engine: Engine, answer: Answer) -> Contributions:
    """Decode an answer again with unfused skills and measure each skill's contribution to each token.

    Args:
        engine: the engine that generated the answer.
        answer: the answer.

    Raises:
        Unsupported: this llama.cpp has another tensor layout.
        UnknownSkill: a skill was removed from the pack.
    """
    steps = measure_by_token(engine, answer)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Contributions = end.value
            return found


def measure_by_token(engine: Engine, answer: Answer) -> Generator[None, None, Contributions]:
    """Run `contributions` one token per step, so that the same thread can serve other answers in between.

    Close the generator before the engine's pack is reloaded.
    """
    prompts = dict(zip(answer.route.steps, answer.prompts, strict=False))
    skills = sorted({name for mix in answer.mixes for name in mix.scales})
    values = np.zeros((len(skills), engine.model.n_layer, len(answer.tokens)), np.float32)
    per_token = answer.route.policy == "token"
    for mix in filter(None, dict.fromkeys(answer.mixes)):
        at = [i for i, found in enumerate(answer.mixes) if found == mix]
        # under the policy `token` a context holds the whole answer, else the tokens of its mix only
        answer_tokens = answer.tokens if per_token else [answer.tokens[i] for i in at]
        prompt = answer.prompts[0] if per_token else prompts[mix]
        found = yield from _measure(engine, mix, prompt, answer_tokens)
        for name, ratios in found.items():
            values[skills.index(name)][:, at] = ratios[:, at] if per_token else ratios
    pieces = _pieces(engine, answer, per_token)
    return Contributions(skills, pieces, list(answer.mixes), values)


def _pieces(engine: Engine, answer: Answer, per_token: bool) -> list[str]:
    """Return the text that each token of an answer completes."""
    decoder, pieces = Detokenizer(engine.model), list[str]()
    for i, (token, mix) in enumerate(zip(answer.tokens, answer.mixes, strict=True)):
        before = ""
        if i and mix != answer.mixes[i - 1] and not per_token:  # the next mix's answer, on a line of its own
            before, decoder = "\n", Detokenizer(engine.model)
        pieces.append(before + decoder.add(token))
    return pieces


def _measure(
    engine: Engine, mix: Mix, prompt: list[int], answer_tokens: Sequence[int]
) -> Generator[None, None, dict[str, Floats]]:
    """Return (L, T) ratios by skill at each of the T answer tokens."""
    watcher = _NodeWatcher()
    options: dict[str, Any] = {"n_ctx": engine.n_ctx, "n_threads": engine.n_threads}
    with engine.exclusive(), closing(Context(engine.model, observe=watcher.callback, **options)) as context:
        active_from = engine.decoder.active_from(
            mix, prompt
        )  # first, because it raises if a skill was removed
        adapters = engine.decoder.adapters.unfused(mix)
        owner: dict[int, str] = {}
        for name, adapter in adapters.items():  # a node names its matrix, not its skill
            context.set_mix([(adapter, 1.0)])
            watcher.start()
            context.decode(prompt[:1])
            owner |= {part.matrix: name for part in watcher.products}
        context.set_mix([(adapter, mix.scales[name]) for name, adapter in adapters.items()])
        if active_from:
            with closing(Context(engine.model, **options)) as bare:
                bare.decode(prompt[:active_from])
                context.load_prefix(bare, active_from)
        if rest := prompt[active_from:-1]:
            context.decode(rest)
        found = {name: np.zeros((engine.model.n_layer, len(answer_tokens)), np.float32) for name in adapters}
        # one token at a time: in the last layer llama.cpp computes only a batch's last token
        for place, token in enumerate([prompt[-1], *answer_tokens[:-1]]):
            watcher.start()
            context.decode([token])
            for name, column in watcher.ratios(owner, engine.model.n_layer).items():
                found[name][:, place] = column
            yield
    return found


class _Product(NamedTuple):
    """The product of one node."""

    layer: int
    target: str
    matrix: int
    """Address of a skill's B; 0 for the base's matrix."""
    square: float


class _NodeWatcher:
    """Reads the products of base matrices and of adapters as llama.cpp computes them."""

    def __init__(self) -> None:
        self.products: list[_Product] = []
        self._describe = ggml("ggml_op_desc", ctypes.c_char_p)
        self._name = ggml("ggml_get_name", ctypes.c_char_p)
        self._data = ggml("ggml_get_data", ctypes.c_void_p)
        self.callback = C.ggml_backend_sched_eval_callback(self._on_node)

    def start(self) -> None:
        """Discard the products read so far."""
        self.products = []

    def _on_node(self, node: int, ask: bool, _user: Any) -> bool:
        op = self._describe(node)
        if op not in (b"MUL_MAT", b"SCALE"):
            return not ask
        operand = first_operand(node)
        if op == b"SCALE":
            operand = first_operand(operand) if self._describe(operand) == b"MUL_MAT" else 0
        match = _TARGET.match(self._name(operand).decode()) if operand else None
        if match is None or bool(match[3]) != (op == b"SCALE"):
            return not ask
        if not ask:
            size = ctypes.c_int64.from_address(node + _NE).value
            row = np.ctypeslib.as_array((ctypes.c_float * size).from_address(self._data(node)))
            self.products.append(
                _Product(int(match[1]), match[2], operand if match[3] else 0, float(row @ row))
            )
        return True

    def ratios(self, owner: dict[int, str], n_layer: int) -> dict[str, Floats]:
        """Return (L,) ratios by skill for the last decoded token.

        Args:
            owner: skill by address of its B.
            n_layer: L.

        Raises:
            Unsupported: no product of an active skill was found in the graph.
        """
        if owner and not any(part.matrix for part in self.products):
            raise Unsupported(f"this llama.cpp shows no adapter in its graph; install {LLAMA_CPP}.")
        base = {(part.layer, part.target): part.square for part in self.products if not part.matrix}
        skill_squares = {name: np.zeros(n_layer) for name in owner.values()}
        base_squares = {name: np.zeros(n_layer) for name in owner.values()}
        for part in self.products:
            if part.matrix:
                name = owner[part.matrix]
                skill_squares[name][part.layer] += part.square
                base_squares[name][part.layer] += base[part.layer, part.target]
        return {
            name: np.sqrt(
                skill_squares[name] / np.where(base_squares[name] > 0, base_squares[name], 1)
            ).astype(np.float32)
            for name in skill_squares
        }


def first_operand(node: int) -> int:
    """Return the address of a graph node's first operand; 0 if it has none."""
    return ctypes.c_void_p.from_address(node + _SRC).value or 0
