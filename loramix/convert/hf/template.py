"""Reads the chat template and the tokens that end an answer from a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramix.convert.hf.config import read_json
from loramix.errors import InvalidArtifact, NotFound
from loramix.formats.textfile import read_text
from loramix.templates.chat_template import MAX_TEMPLATE_BYTES, PLAIN

NAME_OF_PLAIN = "plain"


def read_chat_template(directory: Path) -> str:
    """Read a checkpoint's chat template, looked up as in transformers; empty if there is none.

    ``chat_template.jinja`` has priority over ``tokenizer_config.json``; of several templates, ``default`` is used.

    Args:
        directory: the checkpoint.

    Raises:
        InvalidArtifact: not a template, or several templates without a default.
    """
    found: Any = {}
    if (path := directory / "chat_template.jinja").is_file():
        found["default"] = _text(path)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _text(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = directory / name
        if not found and path.is_file():
            found = read_json(path, dict[str, Any]).get("chat_template")
    match found:
        case None:
            return ""
        case str(text):
            return text
        case list(entries) if all(isinstance(entry, dict) for entry in entries):
            found = {str(entry.get("name")): entry.get("template") for entry in entries}
    if isinstance(found, dict) and isinstance(default := found.get("default"), str):
        return default
    if found and isinstance(found, dict):
        raise InvalidArtifact(
            f"{directory} has chat templates {', '.join(sorted(found))[:200]}, and none is named 'default'; "
            "choose one with --chat-template FILE."
        )
    if found:
        raise InvalidArtifact(
            f"the chat template in {directory} is not text; give one with --chat-template FILE."
        )
    return ""


def given_template(value: str) -> str:
    """Read the template that ``--chat-template`` names.

    Args:
        value: ``plain``, or a Jinja file in UTF-8.

    Raises:
        NotFound: the file does not exist.
        InvalidArtifact: the file is too long, or not UTF-8.
    """
    if value == NAME_OF_PLAIN:
        return PLAIN
    path = Path(value)
    if not path.is_file():
        raise NotFound(f"no file {value!r}; give a Jinja file, or '{NAME_OF_PLAIN}'.")
    return _text(path)


def read_end_tokens(directory: Path, eos: int, n_vocab: int) -> tuple[int, ...]:
    """Collect the tokens that end an answer: the tokenizer's, and those of generation_config.json and config.json.

    Args:
        directory: the checkpoint.
        eos: the tokenizer's end of sequence; first in the result.
        n_vocab: number of tokens in the vocabulary.

    Raises:
        InvalidArtifact: an id is invalid.
    """
    return tuple(dict.fromkeys([eos, *_listed_ends(directory, n_vocab)]))


def find_eos(directory: Path, tokens: Sequence[str]) -> int | None:
    """Find the end of sequence that the tokenizer's settings name by its text, else the first listed in config.json.

    Args:
        directory: the checkpoint.
        tokens: the vocabulary.

    Raises:
        InvalidArtifact: an id is invalid.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        named = read_json(path, dict[str, Any]).get("eos_token") if path.is_file() else None
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and text in tokens:
            return tokens.index(text)
    return next(iter(_listed_ends(directory, len(tokens))), None)


def _listed_ends(directory: Path, n_vocab: int) -> list[int]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        value = read_json(path, dict[str, Any]).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if type(token) is not int or not 0 <= token < n_vocab:
                raise InvalidArtifact(
                    f"{path} names {token!r:.40} as eos_token_id, the vocabulary has {n_vocab} tokens; "
                    "download the checkpoint again."
                )
        found += ids
    return found


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_TEMPLATE_BYTES:
        raise InvalidArtifact(
            f"{path} has {size} bytes, a chat template has at most {MAX_TEMPLATE_BYTES}; give one with "
            "--chat-template FILE."
        )
    return read_text(path, InvalidArtifact)
