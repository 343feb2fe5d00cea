"""Converts the vocabulary of a Hugging Face checkpoint to GGUF: byte-level BPE and SentencePiece.

Reads ``tokenizer.json``, which transformers uses, else ``tokenizer.model``. llama.cpp's pre-tokenizers are built in
and selected by name, so a tokenizer is identified by its parts or rejected. llama.cpp does not normalize: the GGUF
names the normalizer for `loramix.templates.normalizer`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.convert.hf.config import read_json
from loramix.convert.hf.pretokenizer import listed, pre_tokenizer, space_prefix
from loramix.convert.hf.spm_reader import BPE, Piece, read_sentencepiece
from loramix.convert.hf.template import find_eos, read_chat_template, read_end_tokens
from loramix.convert.hf.view import plain_directory
from loramix.errors import InvalidArtifact, NotFound, Unsupported
from loramix.templates.end_tokens import END_TOKENS, end_tokens_text
from loramix.templates.normalizer import NONE, NORMALIZER, normalizer_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "▁"
_SLOW = ("vocab.json", "merges.txt")  # files of transformers' Python tokenizers
_NEVER = -1e9  # score of tokens that no merge makes; tried last, so without effect


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens in the order of their ids, and the settings of the tokenizer."""

    model: str
    """GGUF's name of the algorithm: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece)."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    scores: list[float]
    """Scores of SentencePiece tokens; empty for byte-level BPE, which has ordered merges."""
    special: Any
    """``gguf.SpecialVocab``: merges, special tokens, and whether BOS is added."""
    chat_template: str
    """Jinja text; empty if there is none."""
    ends: tuple[int, ...]
    """Tokens that end an answer, the end of sequence first."""
    space_prefix: bool = True
    """Whether SentencePiece adds a space before the text."""
    normalizer: str = NONE
    """Normalizer applied before tokenization; see `loramix.templates.normalizer`."""

    @property
    def named_tokens(self) -> dict[str, str]:
        """Texts of special tokens by their names in chat templates."""
        ids = self.special.special_token_ids
        return {f"{name}_token": self.tokens[ids[name]] for name in ids if name not in ("eot", "eom")}

    def add_to(self, writer: Any) -> None:
        """Add the vocabulary to a GGUF file.

        Args:
            writer: a ``gguf.GGUFWriter`` that has not written its header.
        """
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        self.special.add_to_gguf(writer, quiet=True)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)
        if self.normalizer != NONE or normalizer_of("", self.pre, "") != NONE:
            writer.add_string(NORMALIZER, self.normalizer)
        if len(self.ends) > 1:
            writer.add_string(END_TOKENS, end_tokens_text(self.ends))


def read_vocabulary(directory: Path, n_vocab: int, chat_template: str | None = None) -> Vocabulary:
    """Read a checkpoint's vocabulary.

    Args:
        directory: holds ``tokenizer.json`` or ``tokenizer.model``, and ``tokenizer_config.json``.
        n_vocab: rows of the token embedding; missing tokens become unused tokens.
        chat_template: Jinja text that replaces the checkpoint's template.

    Raises:
        NotFound: there is no tokenizer.
        InvalidArtifact: a file is damaged, or does not match the size of the embedding.
        Unsupported: llama.cpp would tokenize differently.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        tokenizer = read_json(path, dict[str, Any])
        found = _from_json(tokenizer, path)
        added = tokenizer.get("added_tokens")
    elif (path := directory / "tokenizer.model").is_file():
        found, added = _from_sentencepiece(path), _added_by_config(directory)
    else:
        if all((directory / name).is_file() for name in _SLOW):
            raise Unsupported(
                f"{directory} has {' and '.join(_SLOW)} but no tokenizer.json; download that file too, or write it "
                "with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
            )
        raise NotFound(f"no tokenizer.json or tokenizer.model in {directory}; download the whole checkpoint.")
    tokens, types, scores = _filled(found, n_vocab, path)
    _add(added, tokens, types, path)
    _check(found, tokens, types, path)
    special = _special(directory, found.model, tokens)
    ends = read_end_tokens(directory, special.special_token_ids["eos"], n_vocab)
    for key, token in zip(("eot", "eom"), ends[1:], strict=False):  # other programs read these keys
        special.special_token_ids.setdefault(key, token)
    return Vocabulary(
        found.model,
        found.pre,
        tokens,
        types,
        scores if found.model == "llama" else [],
        special,
        read_chat_template(directory) if chat_template is None else chat_template,
        ends,
        found.space_prefix,
        found.normalizer,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """The content of a tokenizer file, without added tokens."""

    model: str
    pre: str
    pieces: dict[int, Piece]
    space_prefix: bool = True
    normalizer: str = NONE


def _from_json(tokenizer: dict[str, Any], path: Path) -> _Found:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise Unsupported(
            f"{path} is a {kind!s:.40} tokenizer; supported: BPE, byte-level or SentencePiece's."
        )
    if not all(type(i) is int and 0 <= i < 2**24 for i in vocab.values()):
        raise InvalidArtifact(f"{path} has token ids that are not integers; download it again.")
    pieces = {i: Piece(text, 0.0, NORMAL) for text, i in vocab.items()}
    if not model.get("byte_fallback"):
        pre, normalizer = pre_tokenizer(tokenizer, path)
        return _Found("gpt2", pre, pieces, normalizer=normalizer)
    order: dict[str, float] = {}
    for merge in listed(model.get("merges")):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) for p in parts):
            raise InvalidArtifact(f"{path} has a merge that is not a pair: {merge!r:.60}; download it again.")
        order.setdefault("".join(parts), -float(len(order) + 1))
    # SentencePiece merges the pair with the highest score, and the list of merges has this order
    unknown = model.get("unk_token")
    for i, piece in pieces.items():
        byte = len(piece.text) == 6 and piece.text.startswith("<0x")
        kind = BYTE if byte else UNKNOWN if piece.text == unknown else NORMAL
        pieces[i] = Piece(piece.text, order.get(piece.text, _NEVER), kind)
    return _Found("llama", "default", pieces, space_prefix(tokenizer, path))


def _from_sentencepiece(path: Path) -> _Found:
    found = read_sentencepiece(path.read_bytes(), str(path))
    if found.model_type != BPE:
        raise Unsupported(
            f"{path} is not a BPE model of SentencePiece, as Llama bases have; use another checkpoint."
        )
    if found.changes_text:
        raise Unsupported(
            f"{path} maps characters or removes spaces before tokenization, which llama.cpp does not do for Llama "
            "bases; use another checkpoint."
        )
    return _Found("llama", "default", dict(enumerate(found.pieces)), found.add_dummy_prefix)


def _added_by_config(directory: Path) -> list[Any]:
    """Read added tokens without ``tokenizer.json``: from ``added_tokens.json`` and ``tokenizer_config.json``."""
    added: list[Any] = []
    if (path := directory / "added_tokens.json").is_file():
        added += [{"content": text, "id": i} for text, i in read_json(path, dict[str, int]).items()]
    if (path := directory / "tokenizer_config.json").is_file():
        listed = read_json(path, dict[str, Any]).get("added_tokens_decoder")
        for i, token in (listed if isinstance(listed, dict) else {}).items():
            added.append({**token, "id": int(i)} if isinstance(token, dict) and i.isdecimal() else None)
    return added


def _filled(found: _Found, n_vocab: int, path: Path) -> tuple[list[str], list[int], list[float]]:
    """Return tokens, types and scores by id; missing ids become unused tokens, as in llama.cpp's converter."""
    last = max(found.pieces, default=-1)
    if last >= n_vocab:
        raise InvalidArtifact(
            f"{path} has a token with id {last}, the embedding has {n_vocab} rows: "
            "files of several checkpoints are mixed; download it again."
        )
    all_pieces = [found.pieces.get(i, Piece(f"[PAD{i}]", _NEVER, UNUSED)) for i in range(n_vocab)]
    return (
        [piece.text for piece in all_pieces],
        [piece.kind for piece in all_pieces],
        [piece.score for piece in all_pieces],
    )


def _add(added: Any, tokens: list[str], types: list[int], path: Path) -> None:
    """Insert added tokens: special ones become control tokens, others user-defined tokens."""
    for token in listed(added):
        match token:
            case {"content": str(text), "id": int(i)} if i >= 0:
                pass
            case _:
                raise InvalidArtifact(f"{path} has an added token without content or id; download it again.")
        if i >= len(tokens):
            raise InvalidArtifact(
                f"added token {text[:40]!r} of {path} has id {i}, the embedding has {len(tokens)} rows: "
                "files of several checkpoints are mixed; download it again."
            )
        if types[i] == UNKNOWN and tokens[i] == text:
            continue
        control = token.get("special") or (text.startswith("<|") and text.endswith("|>"))
        tokens[i] = text if control else text.replace(SPACE, " ")
        types[i] = CONTROL if control else USER_DEFINED


def _check(found: _Found, tokens: list[str], types: list[int], path: Path) -> None:
    """Check what llama.cpp requires: a token for each byte of plain text, and no empty or repeated token."""
    if found.model == "gpt2":
        from gguf.vocab import bytes_to_unicode

        spelled = bytes_to_unicode()  # bytes that did not occur in training may have no token
        needed = {spelled[byte] for byte in (10, *range(32, 127))}
    else:
        needed = {f"<0x{byte:02X}>" for byte in range(256)}
    if lacking := needed - set(tokens):
        raise Unsupported(
            f"{path} lacks tokens for {len(lacking)} of {len(needed)} required bytes ({min(lacking)}); use another "
            "checkpoint."
        )
    seen: set[str] = set()
    for text in tokens:
        if text in seen or not text:
            raise InvalidArtifact(f"{path} has an empty or repeated token {text[:40]!r}; download it again.")
        seen.add(text)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidArtifact(
                f"{path} has a token that is not Unicode: {text!r:.40}; download it again."
            ) from None


def _special(directory: Path, model: str, tokens: Sequence[str]) -> Any:
    """Read merges and special tokens with ``gguf``.

    Raises:
        InvalidArtifact: a file is damaged, or there is no end-of-sequence token.
    """
    import gguf

    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # its warnings are for authors of converters
    try:
        with plain_directory(directory) as plain:
            special = gguf.SpecialVocab(plain, load_merges=model == "gpt2", n_vocab=len(tokens))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InvalidArtifact(
            f"the tokenizer's settings in {directory} cannot be used ({error}); download them again."
        ) from None
    ids = special.special_token_ids
    if (eos := ids.get("eos", find_eos(directory, tokens))) is None:
        raise InvalidArtifact(
            f"no end-of-sequence token in {directory}: tokenizer_config.json or config.json must name eos_token."
        )
    ids["eos"] = eos
    if model == "gpt2" and not special.merges:
        raise InvalidArtifact(f"no merges in {directory / 'tokenizer.json'}; download it again.")
    special.chat_template = None  # read by `read_chat_template` instead
    for name in _lacking(directory, ("bos", "unk", "sep", "pad", "cls", "mask")):
        ids.pop(name, None)  # config.json may name one that the tokenizer does not have
    # by default transformers adds BOS for SentencePiece and not for BPE
    special.add_special_token.setdefault("bos", model == "llama")
    special.add_special_token.setdefault("eos", False)
    special.add_special_token["bos"] &= "bos" in ids  # llama.cpp would add its default, token 11 or 1
    return special


def _lacking(directory: Path, names: Sequence[str]) -> list[str]:
    """Return the special tokens that the tokenizer lacks according to transformers."""
    path, older = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    settings = read_json(path, dict[str, Any]) if path.is_file() else {}
    known = {**(read_json(older, dict[str, Any]) if older.is_file() else {}), **settings}
    # other classes have default tokens, such as <s> of LlamaTokenizer
    plain = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return [name for name in names if known.get(f"{name}_token", None if plain else "") is None]
