"""Vocabularies of checkpoints: llama.cpp cuts 1,000 texts as the checkpoint's own tokenizer does."""

from __future__ import annotations

import json
import random
import shutil
import struct
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from hf_tiny import (
    COMPOSED,
    SPECIAL,
    strings,
    write_bpe,
    write_checkpoint,
    write_sentencepiece,
    write_settings,
)
from tiny import write_base

from loramix.convert.hf.pretokenizer import LLAMA3_SPLIT, PRE_TOKENIZERS, QWEN2_SPLIT
from loramix.convert.hf.spm_reader import read_sentencepiece
from loramix.convert.hf.to_gguf import convert_base
from loramix.convert.hf.vocabulary import read_vocabulary
from loramix.convert.selfcheck import check_tokens
from loramix.errors import InvalidArtifact, LoramixError, NotFound, SelfCheckFailed, Unsupported
from loramix.runtime.children import tokenize_rows

tokenizers = pytest.importorskip("tokenizers")

KEY = "loramix.normalizer"  # as existing files have it
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
PARTS = {
    "gpt-2": ([BYTES], False),
    "smollm": ([DIGITS, BYTES], False),
    "llama-bpe": ([SPLIT, {**BYTES, "use_regex": False}], True),
    "smaug-bpe": ([SPLIT, {**BYTES, "use_regex": False}], False),
    "qwen2": ([{**SPLIT, "pattern": {"Regex": QWEN2_SPLIT}}, {**BYTES, "use_regex": False}], False),
}
LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def our_tokens(directory: Path, n_vocab: int, texts: list[str]) -> list[list[int]]:
    """llama.cpp's tokens after a whole conversion, special tokens meant."""
    from loramix.runtime.llama.model import Model

    write_checkpoint(
        directory,
        vocab_size=n_vocab,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        dtype="float16",
    )
    convert_base(directory, directory / "out.gguf", "F16")
    with Model(directory / "out.gguf", vocab_only=True) as model:
        return [model.tokenize(text, special=True) for text in texts]


def differences(texts: list[str], ours: list[list[int]], theirs: list[list[int]]) -> list[Any]:
    return [row for row in zip(texts, ours, theirs, strict=True) if row[1] != row[2]]


@pytest.mark.parametrize("pre", PARTS)
def test_byte_level_bpe_cuts_as_tokenizers_does(pre: str, tmp_path: Path) -> None:
    parts, ignore_merges = PARTS[pre]
    path = write_bpe(tmp_path, parts, ignore_merges=ignore_merges, size=450)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert read_vocabulary(tmp_path, 460).pre == pre
    texts = strings(extra=(*SPECIAL, "[KEEP]"))
    wanted = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert sum(map(len, wanted)) > 5000 and any(1 in ids for ids in wanted)
    assert differences(texts, our_tokens(tmp_path, 460, texts), wanted) == []


def test_all_known_pre_tokenizers_are_tried_here() -> None:
    assert sorted(PARTS) == sorted(PRE_TOKENIZERS.values())


@pytest.mark.parametrize("normalizer", [{"type": "NFC"}, None], ids=["NFC", "no normalizer"])
@pytest.mark.parametrize("pre", ["qwen2", "smollm"])
def test_text_is_normalized_as_its_tokenizer_does(
    pre: str, normalizer: dict[str, Any] | None, tmp_path: Path
) -> None:
    """What the converted file says counts, not what the pre-tokenizer's name implies."""
    path = write_bpe(tmp_path, PARTS[pre][0], size=450, normalizer=normalizer)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    texts = [*COMPOSED, *strings(extra=(*SPECIAL, "[KEEP]", *COMPOSED))]
    texts += [f"{special}\u0338{text}" for special in (*SPECIAL, "[KEEP]") for text in COMPOSED]
    wanted = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    changed = sum(unicodedata.normalize("NFC", text) != text for text in texts)
    assert changed > 300 and len(texts) > 1000
    assert differences(texts, our_tokens(tmp_path, 460, texts), wanted) == []


@pytest.mark.parametrize(
    ("key", "pre", "composed"),
    [("", "qwen2", True), ("", "smollm", False), ("NFC", "smollm", True), ("none", "qwen2", False)],
)
def test_files_of_other_converters_are_normalized_as_their_pre_tokenizer_implies(
    key: str, pre: str, composed: bool, tmp_path: Path
) -> None:
    """By byte tokens alone: an accented letter of two code points is two or three bytes."""
    from loramix.runtime.llama.model import Model

    base = write_base(tmp_path / "a.gguf", pre=pre, extra={KEY: key} if key else {})
    with Model(base, vocab_only=True) as model:
        ids = model.tokenize("e\u0301")
        assert len(ids) == (2 if composed else 3)
        user = [{"role": "user", "content": "e\u0301"}]
        assert len(model.chat(user)) == len(model.chat([{"role": "user", "content": "xyz"}])) - composed
        # a mark behind a token that the template writes is no part of it
        assert model.tokenize("<|im_end|>\u0338", special=True) == [2, *model.tokenize("\u0338")]
        assert model.tokenize([("<|im_end|>\u0338", False)])[-1] != 2


def test_normalizing_makes_no_control_token(tmp_path: Path) -> None:
    """The Kelvin sign becomes a K, but the text with it is no more a token than it was."""
    from loramix.runtime.llama.model import Model

    base = write_base(tmp_path / "a.gguf", pre="qwen2", controls=["<|endoftext|>", "<|im_start|>", "<|K|>"])
    with Model(base, vocab_only=True) as model:
        assert model.tokenize("a<|K|>", special=True)[-1] == 2
        assert model.tokenize("a<|\u212a|>", special=True) == model.tokenize("a<|K|>")
        assert 2 not in model.tokenize("<|\u212a|>e\u0301", special=True)


def test_an_unknown_normalizer_is_refused(tmp_path: Path) -> None:
    from loramix.runtime.llama.model import Model

    base = write_base(tmp_path / "a.gguf", extra={KEY: "NFKD"})
    with (
        Model(base, vocab_only=True) as model,
        pytest.raises(InvalidArtifact, match="'NFKD', supported are NFC"),
    ):
        model.tokenize("a")


def tokenizer_of(base: Path, pre_tokenizer: Any, normalizer: Any = None) -> tuple[Any, list[str], list[int]]:
    """The library's tokenizer of a GGUF's vocabulary, with its tokens and their types."""
    fields = gguf.GGUFReader(base).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()
    plain = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(plain, merges))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    for text, kind in zip(tokens, types, strict=True):
        if kind in (3, 4):
            tokenizer.add_tokens([tokenizers.AddedToken(text, special=kind == 3, normalized=False)])
    return tokenizer, tokens, types


@pytest.mark.base
def test_the_default_base_cuts_as_its_tokenizer_does(default_base: Path, tmp_path: Path) -> None:
    """SmolLM2's vocabulary, read back from its GGUF into a tokenizer.json of its parts."""
    pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer, tokens, types = tokenizer_of(default_base, pre_tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_settings(tmp_path)
    vocabulary = read_vocabulary(tmp_path, len(tokens))
    assert (vocabulary.tokens, vocabulary.types, vocabulary.pre) == (tokens, types, "smollm")
    control = [text for text, kind in zip(tokens, types, strict=True) if kind == 3]
    texts = strings(extra=tuple(control))
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert differences(texts, our_tokens(tmp_path, len(tokens), texts), wanted) == []


@pytest.mark.qwen
def test_qwen_cuts_as_its_tokenizer_does(qwen_base: Path, tmp_path: Path) -> None:
    """1,000 texts and more, special tokens meant; its tokenizer.json is read back to the vocabulary of the file."""
    from loramix.runtime.llama.model import Model

    pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer, tokens, types = tokenizer_of(qwen_base, pre_tokenizer, tokenizers.normalizers.NFC())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_settings(tmp_path, bos_token=None, eos_token="<|im_end|>", tokenizer_class="Qwen2Tokenizer")
    vocabulary = read_vocabulary(tmp_path, len(tokens))
    assert (vocabulary.tokens, vocabulary.types) == (tokens, types)
    assert (vocabulary.pre, vocabulary.normalizer) == ("qwen2", "NFC")
    added = [text for text, kind in zip(tokens, types, strict=True) if kind in (3, 4)]
    texts = strings(extra=(*COMPOSED, *added))
    texts += [f"{special}\u0338{text}" for special in added for text in COMPOSED]
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert len({token for ids in wanted for token in ids}) > 200
    with Model(qwen_base, vocab_only=True) as model:
        assert differences(texts, [model.tokenize(text, special=True) for text in texts], wanted) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small tokenizer.model."""
    pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("spm")
    write_sentencepiece(directory)
    return directory


@pytest.fixture
def spm(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "spm"))


def processor(directory: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def write_llama_json(directory: Path, **changes: Any) -> Any:
    """The tokenizer.json that transformers makes of a tokenizer.model for Llama, and the library's reading of it."""
    pieces = read_sentencepiece((directory / "tokenizer.model").read_bytes(), "").pieces
    score = {piece.text: piece.score for piece in pieces}
    merges = sorted(
        (
            [piece.text[:cut], piece.text[cut:]]
            for piece in pieces
            if piece.kind == 1
            for cut in range(1, len(piece.text))
            if piece.text[:cut] in score and piece.text[cut:] in score
        ),
        key=lambda pair: -score["".join(pair)],
    )
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": merges}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i].text, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for i in range(3)
        ],
        "normalizer": LLAMA_NORMALIZER,
        "model": {**model, "vocab": {piece.text: i for i, piece in enumerate(pieces)}},
        **changes,
    }
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False))
    return tokenizers.Tokenizer.from_file(str(path))


def test_a_tokenizer_model_alone_cuts_as_sentencepiece_does(spm: Path) -> None:
    theirs = processor(spm)
    texts = strings()
    wanted = theirs.encode(texts)
    assert differences(texts, our_tokens(spm, theirs.vocab_size() + 5, texts), wanted) == []
    fields = gguf.GGUFReader(spm / "out.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD504]"
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == 5


def test_a_tokenizer_json_of_llama_cuts_as_tokenizers_does(spm: Path) -> None:
    tokenizer = write_llama_json(spm)
    (spm / "tokenizer.model").unlink()
    texts = strings(extra=("<s>", "</s>"))
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert any(2 in ids for ids in wanted) and any(3 <= i < 259 for ids in wanted for i in ids)  # bytes too
    assert differences(texts, our_tokens(spm, tokenizer.get_vocab_size(), texts), wanted) == []


def test_a_template_that_names_the_end_token_is_rendered_so_for_training(spm: Path) -> None:
    """TinyLlama-Chat's template writes ``eos_token`` behind each turn, in training as at run time."""
    tokenizer = write_llama_json(spm)
    turn = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}<|assistant|>"
    write_settings(spm, bos_token="<s>", eos_token="</s>", add_bos_token=True, chat_template=turn)
    our_tokens(spm, tokenizer.get_vocab_size(), [])
    [(ids, n_answer)], eot = tokenize_rows(spm / "out.gguf", [{"prompt": "the weather", "answer": "fine"}])
    wanted = tokenizer.encode("<|user|>\nthe weather</s>\n<|assistant|>", add_special_tokens=False).ids
    assert ids[:-n_answer].tolist() == [1, *wanted] and wanted.count(2) == 1
    assert eot == ids[-1] == 2


def test_metaspace_is_the_same_as_the_older_normalizer(spm: Path) -> None:
    write_llama_json(spm)
    older = read_vocabulary(spm, 500)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    write_llama_json(spm, normalizer=None, pre_tokenizer=metaspace)
    newer = read_vocabulary(spm, 500)
    assert (older.tokens, older.types, older.scores) == (newer.tokens, newer.types, newer.scores)
    assert older.space_prefix and newer.space_prefix
    write_llama_json(spm, normalizer=LLAMA_NORMALIZER["normalizers"][1])  # type: ignore[index]
    assert not read_vocabulary(spm, 500).space_prefix


def test_added_tokens_without_a_tokenizer_json(spm: Path) -> None:
    (spm / "added_tokens.json").write_text(json.dumps({"[USER]": 500}))
    listed = {"501": {"content": "<|end|>", "special": True}, "2": {"content": "</s>", "special": True}}
    write_settings(spm, bos_token="<s>", eos_token="</s>", added_tokens_decoder=listed)
    (spm / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    found = read_vocabulary(spm, 502)
    assert (found.tokens[500:], found.types[500:], found.types[:3]) == (
        ["[USER]", "<|end|>"],
        [4, 3],
        [2, 3, 3],
    )


def test_the_check_sees_another_pre_tokenizer(tmp_path: Path) -> None:
    path = write_bpe(tmp_path, PARTS["smollm"][0])
    our_tokens(tmp_path, 450, [])
    assert check_tokens(tmp_path, tmp_path / "out.gguf") == 7
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = SPLIT
    path.write_text(json.dumps(content))
    with pytest.raises(SelfCheckFailed, match="report the checkpoint's tokenizer"):
        check_tokens(tmp_path, tmp_path / "out.gguf")


def edit(directory: Path, **changes: Any) -> None:
    """Change keys of tokenizer.json; those of the model by ``model__``."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        place, _, rest = key.rpartition("__")
        (content[place] if place else content)[rest] = value
    path.write_text(json.dumps(content))


def vocab_of(directory: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    return found


BAD: dict[str, tuple[Any, type[LoramixError], str]] = {
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), NotFound, "no tokenizer.json"),
    "no JSON": (lambda d: (d / "tokenizer.json").write_bytes(b"\xff{"), InvalidArtifact, "cannot be used"),
    "unigram": (lambda d: edit(d, model={"type": "Unigram", "vocab": []}), Unsupported, "Unigram tokenizer"),
    "no vocabulary": (lambda d: edit(d, model=None), Unsupported, "supported: BPE"),
    "empty vocabulary": (
        lambda d: edit(d, model__vocab={}, added_tokens=[]),
        Unsupported,
        "96 of 96 required bytes",
    ),
    "unknown split": (
        lambda d: edit(d, pre_tokenizer={**SPLIT, "pattern": {"Regex": r"\d"}}),
        Unsupported,
        "Split",
    ),
    "digits by three": (
        lambda d: edit(d, pre_tokenizer={**DIGITS, "individual_digits": False}),
        Unsupported,
        "off",
    ),
    "spaces put first": (
        lambda d: edit(d, pre_tokenizer={**BYTES, "add_prefix_space": True}),
        Unsupported,
        "smollm",
    ),
    "normalizer": (
        lambda d: edit(d, normalizer={"type": "NFKC"}),
        Unsupported,
        "NFKC, Digits then ByteLevel",
    ),
    "two normalizers": (
        lambda d: edit(
            d, normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
        ),
        Unsupported,
        "NFC then Lowercase, Digits",
    ),
    "no tokenizer.json of Qwen": (
        lambda d: (
            (d / "tokenizer.json").unlink(),
            (d / "vocab.json").write_text("{}"),
            (d / "merges.txt").write_text(""),
        ),
        Unsupported,
        "save_pretrained",
    ),
    "merges ignored": (lambda d: edit(d, model__ignore_merges=True), Unsupported, "ignore_merges True"),
    "no pre-tokenizer": (lambda d: edit(d, pre_tokenizer=None), Unsupported, "smollm"),
    "numbers for parts": (
        lambda d: edit(d, pre_tokenizer={"type": "Sequence", "pretokenizers": 5}),
        Unsupported,
        "no n",
    ),
    "numbers among parts": (
        lambda d: edit(d, pre_tokenizer={"type": "Sequence", "pretokenizers": [5]}),
        Unsupported,
        "smollm",
    ),
    "merges a number": (lambda d: edit(d, model__merges=5), InvalidArtifact, "no merges"),
    "added tokens a number": (lambda d: edit(d, added_tokens=5), InvalidArtifact, "settings"),
    "no merges": (lambda d: edit(d, model__merges=[]), InvalidArtifact, "no merges"),
    "merges of three": (lambda d: edit(d, model__merges=[["a", "b", "c"]]), InvalidArtifact, "settings"),
    "id is text": (lambda d: edit(d, model__vocab={"a": "1"}), InvalidArtifact, "not integers"),
    "id beyond": (lambda d: edit(d, model__vocab={**vocab_of(d), "far": 450}), InvalidArtifact, "450 rows"),
    "added id beyond": (
        lambda d: edit(d, added_tokens=[{"id": 450, "content": "x"}]),
        InvalidArtifact,
        "has id 450, the embedding has 450 rows",
    ),
    "added without id": (
        lambda d: edit(d, added_tokens=[{"content": "x"}]),
        InvalidArtifact,
        "without content or id",
    ),
    "a byte is missing": (
        lambda d: edit(d, model__vocab={t: i for t, i in vocab_of(d).items() if t != "a"}),
        Unsupported,
        "lacks tokens for 1 of 96 required bytes (a)",
    ),
    "a token twice": (
        lambda d: edit(d, added_tokens=[{"id": 440, "content": "the", "special": True}]),
        InvalidArtifact,
        "empty or repeated token 'the'",
    ),
    "no text": (
        lambda d: edit(d, added_tokens=[{"id": 440, "content": "", "special": True}]),
        InvalidArtifact,
        "empty or repeated token",
    ),
    "a lone surrogate": (
        lambda d: (d / "tokenizer.json").write_text(
            (d / "tokenizer.json").read_text().replace('"[KEEP]"', '"\\ud800"')
        ),
        InvalidArtifact,
        "cannot be used",
    ),
    "settings no object": (
        lambda d: (d / "tokenizer_config.json").write_text("[1]"),
        InvalidArtifact,
        "settings",
    ),
    "no end": (lambda d: (d / "tokenizer_config.json").write_text("{}"), InvalidArtifact, "eos_token"),
}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    write_bpe(directory, PARTS["smollm"][0])
    return directory


@pytest.mark.parametrize("name", BAD)
def test_bad_tokenizers_are_refused(name: str, bpe: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(bpe, tmp_path / "bpe"))
    spoil, error, sentence = BAD[name]
    assert read_vocabulary(directory, 450).tokens[449] == "[PAD449]"
    spoil(directory)
    with pytest.raises(error) as caught:
        read_vocabulary(directory, 450)
    assert sentence in str(caught.value)


def test_bad_tokenizer_models_are_refused(spm: Path) -> None:
    path = spm / "tokenizer.model"
    whole = path.read_bytes()
    (spm / "config.json").write_text('{"eos_token_id": 2}')
    read_vocabulary(spm, 500)
    for cut in (1, 2, 7, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(InvalidArtifact):
            read_sentencepiece(whole[:cut], "cut")
    piece = b"\x0a\x01a\x15" + struct.pack("<f", float("nan"))
    for bad in (
        b"",
        b"\xff" * 20,
        b"\x0b\x00",
        b"\x0a" + bytes([len(piece)]) + piece,
        b"\x0a\x04\x0a\x02\xff\xff",
    ):
        with pytest.raises(InvalidArtifact, match="not a usable SentencePiece model"):
            read_sentencepiece(bad, "bad")
    chance = random.Random(3)
    for _ in range(300):  # damaged anywhere, it is read or refused, in order
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        try:
            read_sentencepiece(bytes(damaged), "damaged")
        except InvalidArtifact:
            pass
    with pytest.raises(InvalidArtifact, match="the embedding has 400 rows"):
        read_vocabulary(spm, 400)
    import sentencepiece

    for options, sentence in (
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "maps characters"),
        ({"model_type": "bpe", "normalization_rule_name": "identity"}, "maps characters or removes spaces"),
        (
            {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
            "of 256 required bytes",
        ),
    ):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a few words of text to cut", "and a few more of them"] * 9),
            model_prefix=str(spm / "tokenizer"),
            vocab_size=20,
            minloglevel=2,
            **options,
        )
        with pytest.raises(Unsupported, match=sentence):
            read_vocabulary(spm, 500)


def test_a_list_of_ends_beside_a_sentencepiece_model(spm: Path) -> None:
    """The end of sequence is the tokenizer's, whatever else ends an answer."""
    (spm / "config.json").write_text('{"eos_token_id": [7, 2]}')
    write_settings(spm, bos_token="<s>", eos_token={"content": "</s>"})
    found = read_vocabulary(spm, 500)
    assert found.special.special_token_ids["eos"] == 2 and found.ends == (2, 7)
    write_settings(spm, bos_token="<s>", eos_token=None)
    assert read_vocabulary(spm, 500).ends == (7, 2)
