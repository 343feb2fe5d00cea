"""Compares a converted adapter or base in llama.cpp with PyTorch, and checks that an adapter has an effect."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.convert.reference import torch_logits
from loramix.errors import REFUSED, InvalidArtifact, SelfCheckFailed
from loramix.formats.textfile import read_text
from loramix.formats.validate import BaseShape, check_adapter, read_adapter_bytes, read_base
from loramix.models.softmax import log_softmax
from loramix.templates.chat_template import Segment

PROBES = (
    "The weather was fine, and the whole village had come to the market to look at the new clock.",
    "Is this a good idea? We sold 1,250 tickets in 3 days, but the hall holds only 900 people.",
    "def area(width, height):\n    return width * height\n",
)
SPELLINGS = (
    "  two spaces,\ttab\n\n and lines \r\n",
    "naïve café, cafe\u0301, ÅNGSTRÖM, don't, I'LL, 1234567, 3.14",
    "你好，世界 🙂👩‍🚀 مرحبا नमस्ते",
    "x = [i**2 for i in range(10)]  # comment",
)
MAX_KL = 0.02
MAX_KL_4_BITS = 1.0
"""Limit for a 4-bit base: wrong conversions exceed it, rounding of a small base reaches a tenth of it."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Difference between llama.cpp's and PyTorch's logits, over all positions of the probe texts."""

    max_difference: float
    mean_kl: float
    """Mean Kullback-Leibler divergence, PyTorch to llama.cpp, nats per token."""
    same_argmax: float
    effect: float
    """Largest change of the bare base's logits by the adapters, in llama.cpp."""


def llama_logits(
    base: Path, adapters: Sequence[tuple[Path, float]], texts: Sequence[str | Sequence[Segment]] = PROBES
) -> tuple[list[npt.NDArray[np.float32]], list[list[int]]]:
    """Compute llama.cpp's logits at every position, and the token ids.

    Args:
        base: GGUF base.
        adapters: GGUF LoRA files with scales.
        texts: plain texts, or conversations from `loramix.templates.chat_template.ChatTemplate.segments`.

    Returns:
        (T, V) float32 and ids for each text.
    """
    _, shape = read_base(base)
    contents = [(read_adapter_bytes(path), scale) for path, scale in adapters]
    for (content, _), (path, _) in zip(contents, adapters, strict=True):
        check_adapter(content, shape, str(path))
    return logits_of(base, shape, contents, texts)


def logits_of(
    base: Path,
    shape: BaseShape,
    adapters: Sequence[tuple[bytes, float]],
    texts: Sequence[str | Sequence[Segment]],
) -> tuple[list[npt.NDArray[np.float32]], list[list[int]]]:
    """Compute `llama_logits` for a validated base and validated adapters."""
    from loramix.hardware import default_threads
    from loramix.runtime.llama.context import Context
    from loramix.runtime.llama.model import Model
    from loramix.runtime.probe import verdict_for

    rows: list[npt.NDArray[np.float32]] = []
    with Model(base, use_extra_bufts=verdict_for(base).use_extra_bufts) as model:
        mix = [(model.load_adapter(content, base.name), scale) for content, scale in adapters]
        exact = shape.tensor_types <= {"F32"}  # then only the conversion can cause differences
        n_ctx = min(512, model.n_ctx_train)
        context = Context(model, mix, n_ctx=n_ctx, n_threads=default_threads(), exact=exact)
        ids = [model.with_bos(model.tokenize(text))[: context.n_ctx] for text in texts]
        for tokens in ids:
            context.truncate(0)
            rows.append(np.stack([context.decode([token]) for token in tokens]))
    return rows, ids


def parity(base: Path, adapters: Sequence[tuple[Path, Path, float]], texts: Sequence[str] = PROBES) -> Parity:
    """Compare a mix of adapters in llama.cpp with the same mix in PyTorch.

    Args:
        base: GGUF base.
        adapters: (GGUF LoRA, PEFT directory, scale).
        texts: plain texts.

    Raises:
        MissingExtra: torch is not installed.
    """
    ours, ids = llama_logits(base, [(gguf, scale) for gguf, _, scale in adapters], texts)
    bare, _ = llama_logits(base, [], texts)
    theirs = torch_logits(base, [(peft, scale) for _, peft, scale in adapters], ids)
    a, b, none = np.concatenate(ours), np.concatenate(theirs), np.concatenate(bare)
    return Parity(
        max_difference=float(np.abs(a - b).max()),
        mean_kl=mean_kl(theirs, ours),
        same_argmax=same_argmax(ours, theirs),
        effect=float(np.abs(a - none).max()),
    )


def mean_kl(true: Sequence[npt.NDArray[np.float32]], found: Sequence[npt.NDArray[np.float32]]) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions, nats per token.

    Args:
        true: (T, V) reference logits of each text.
        found: (T, V) logits to compare, of the same texts.
    """
    total = 0.0
    for a, b in zip(true, found, strict=True):
        p, q = log_softmax(a), log_softmax(b)
        total += float((np.exp(p) * (p - q)).sum())
    return total / sum(map(len, true))


def same_argmax(a: Sequence[npt.NDArray[np.float32]], b: Sequence[npt.NDArray[np.float32]]) -> float:
    """Share of positions over all texts where two sets of (T, V) logits choose the same token."""
    same = [x.argmax(axis=1) == y.argmax(axis=1) for x, y in zip(a, b, strict=True)]
    return float(np.concatenate(same).mean())


def check(base: Path, adapter: Path, peft: Path, *, exact: bool) -> Parity:
    """Compare a converted adapter with its source.

    Args:
        base: GGUF base.
        adapter: the converted file.
        peft: its source.
        exact: whether the base is float32, so that logits must agree within the architecture's tolerance; the
            mean KL must be at most 0.02 in any case.

    Raises:
        SelfCheckFailed: the adapter differs from its source, or has no effect.
    """
    found = parity(base, [(adapter, peft, 1.0)])
    _need_effect(found.effect, adapter)
    limit = read_base(base)[1].architecture.logit_tolerance
    if (exact and found.max_difference > limit) or found.mean_kl > MAX_KL:
        raise SelfCheckFailed(
            f"{adapter} differs from {peft}: logits by up to {found.max_difference:.4f}, KL {found.mean_kl:.4f} "
            f"(at most {MAX_KL}); check that the base is the one that it was trained on."
        )
    return found


def applied(base: Path, adapter: Path) -> float:
    """Return the largest change of the base's logits by an adapter, as a check without PyTorch.

    Raises:
        SelfCheckFailed: the adapter has no effect.
    """
    with_it, _ = llama_logits(base, [(adapter, 1.0)], PROBES[:1])
    without, _ = llama_logits(base, [], PROBES[:1])
    effect = float(np.abs(with_it[0] - without[0]).max())
    _need_effect(effect, adapter)
    return effect


def _need_effect(effect: float, adapter: Path) -> None:
    if effect == 0.0:
        raise SelfCheckFailed(f"{adapter} changes nothing in llama.cpp: it is not applied, or untrained.")


@dataclass(frozen=True, slots=True)
class BaseParity:
    """Difference between a converted base and its checkpoint in PyTorch (float32), over the probe texts."""

    max_difference: float
    mean_kl: float
    """Mean Kullback-Leibler divergence, PyTorch to llama.cpp, nats per token."""
    same_argmax: float
    perplexity: tuple[float, float]
    """Perplexity in PyTorch, and of the converted file in llama.cpp."""
    n_tokens: int


def check_base(source: Path, base: Path, quant: str) -> BaseParity:
    """Compare a converted base with its checkpoint.

    Args:
        source: Hugging Face directory.
        base: the converted file.
        quant: type of the file; with F32 logits must agree within the architecture's tolerance, with others only
            the mean KL is limited.

    Raises:
        SelfCheckFailed: the difference exceeds the limit.
        MissingExtra: torch is not installed.
    """
    rows, ids = llama_logits(base, [])
    theirs = torch_logits(source, [], ids)
    a, b = np.concatenate(rows), np.concatenate(theirs)
    p, q = log_softmax(b), log_softmax(a)
    # each position predicts the next token; the last one of a text has none
    at = np.cumsum([0, *map(len, ids)])
    predicting = [int(start) + i for start, text in zip(at, ids, strict=False) for i in range(len(text) - 1)]
    following = [token for text in ids for token in text[1:]]
    perplexity = tuple(float(np.exp(-x[predicting, following].mean())) for x in (p, q))
    found = BaseParity(
        max_difference=float(np.abs(a - b).max()),
        mean_kl=float((np.exp(p) * (p - q)).sum(axis=1).mean()),
        same_argmax=same_argmax(rows, theirs),
        perplexity=(perplexity[0], perplexity[1]),
        n_tokens=len(following),
    )
    limit = MAX_KL_4_BITS if quant.startswith("Q4") else MAX_KL
    tolerance = read_base(base)[1].architecture.logit_tolerance
    if (quant == "F32" and found.max_difference > tolerance) or found.mean_kl > limit:
        raise SelfCheckFailed(
            f"{base} differs from {source}: logits by up to {found.max_difference:.4f}, KL {found.mean_kl:.4f} "
            f"(at most {limit}); do not use it, and report the checkpoint's config.json."
        )
    return found


def check_tokens(source: Path, base: Path, texts: Sequence[str] = (*PROBES, *SPELLINGS)) -> int:
    """Compare a converted base's tokens with those of its checkpoint's ``tokenizer.json``.

    Args:
        source: Hugging Face directory.
        base: the converted file.
        texts: plain texts.

    Returns:
        Number of texts; 0 if the checkpoint has no such file or the package ``tokenizers`` is missing.

    Raises:
        SelfCheckFailed: a text has different tokens.
    """
    if importlib.util.find_spec("tokenizers") is None or not (source / "tokenizer.json").is_file():
        return 0
    from tokenizers import Tokenizer

    from loramix.runtime.llama.model import Model

    theirs = Tokenizer.from_str(read_text(source / "tokenizer.json", InvalidArtifact))
    with Model(base, vocab_only=True) as model:
        for text in texts:
            ours, wanted = model.tokenize(text), theirs.encode(text, add_special_tokens=False).ids
            if ours != wanted:
                raise SelfCheckFailed(
                    f"{base} tokenizes {text[:40]!r} as {ours[:12]}, {source / 'tokenizer.json'} as {wanted[:12]}; "
                    "do not use it, and report the checkpoint's tokenizer."
                )
    return len(texts)


if __name__ == "__main__":  # BASE ADAPTER, for `loramix.runtime.children.adapter_effect`
    try:
        print(applied(Path(sys.argv[1]), Path(sys.argv[2])))
    except SelfCheckFailed as failure:
        print(failure, file=sys.stderr)
        sys.exit(REFUSED)
