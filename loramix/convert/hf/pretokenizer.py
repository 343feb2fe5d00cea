"""Identifies the normalizer and pre-tokenizer of a ``tokenizer.json`` by their parts, or rejects them.

llama.cpp's pre-tokenizers are built in and selected by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramix.errors import Unsupported
from loramix.templates.normalizer import NFC, NONE

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digits are split one by one
# (pre-tokenizer's parts, ignore_merges): llama.cpp's name for it (src/llama-vocab.cpp)
PRE_TOKENIZERS = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", LLAMA3_SPLIT), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", LLAMA3_SPLIT), ("ByteLevel", False)), False): "smaug-bpe",
    ((("Split", QWEN2_SPLIT), ("ByteLevel", False)), False): "qwen2",
}


def pre_tokenizer(tokenizer: dict[str, Any], path: Path) -> tuple[str, str]:
    """Return llama.cpp's name of a byte-level BPE's pre-tokenizer, and the normalizer before it.

    Args:
        tokenizer: content of ``tokenizer.json``.
        path: path of the file, for messages.

    Returns:
        The name, and `loramix.templates.normalizer.NFC` or `loramix.templates.normalizer.NONE`.

    Raises:
        Unsupported: llama.cpp has no such pre-tokenizer, or the normalizer is not NFC.
    """
    parts: list[tuple[str, Any]] = []
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind, what = step.get("type"), None
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            what = step.get("use_regex", True)
        elif kind == "Digits":
            what = step.get("individual_digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            what = pattern.get("Regex") if isinstance(pattern, dict) else None
        parts.append((str(kind), what if isinstance(what, bool | str) else None))
    normal = _steps(tokenizer.get("normalizer"), "normalizers")
    merged = bool(tokenizer["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((tuple(parts), merged))
    kinds = [str(step.get("type")) for step in normal]
    if name is None or set(kinds) - {NFC}:
        shown = " then ".join(kinds) or "no normalizer"
        shown += ", " + (
            " then ".join(kind if what is not False else f"{kind} (off)" for kind, what in parts)
        )
        known = ", ".join(sorted(PRE_TOKENIZERS.values()))
        raise Unsupported(
            f"{path} has an unknown pre-tokenizer ({shown}, ignore_merges {merged}); "
            f"supported are the pre-tokenizers that llama.cpp calls {known}, with {NFC} or no normalizer."
        )
    return name, NFC if kinds else NONE


def space_prefix(tokenizer: dict[str, Any], path: Path) -> bool:
    """Whether a SentencePiece tokenizer adds a space before the text.

    Raises:
        Unsupported: the tokenizer changes the text in another way.
    """
    spaced = prefix = False
    for step in [
        *_steps(tokenizer.get("normalizer"), "normalizers"),
        *_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                spaced = True
            case {"type": "Metaspace", "replacement": "▁"} if not step.get("split"):
                spaced = True
                prefix = prefix or step.get("prepend_scheme", "always") != "never"
            case _:
                spaced = False
                break
    if not spaced:
        raise Unsupported(
            f"{path} changes text in another way than SentencePiece for Llama; use another checkpoint."
        )
    return prefix


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """Return the parts of a normalizer or pre-tokenizer; a sequence is flattened."""
    if not isinstance(part, dict):
        return []
    steps = listed(part.get(inner)) if part.get("type") == "Sequence" else [part]
    return [step if isinstance(step, dict) else {} for step in steps]


def listed(value: Any) -> list[Any]:
    """Return a list from an untrusted file; empty if the value is not a list."""
    return value if isinstance(value, list) else []
