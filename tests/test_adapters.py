"""Adapters in native memory: made on demand, one for any mix, few at once, untouched by files that change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loramix import Engine
from loramix.errors import InvalidArtifact
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.runtime import adapters
from loramix.runtime.adapters import AdapterFile

PROMPT = "the quick brown fox"


@pytest.fixture
def engine(pack: Path) -> Iterator[Any]:
    with Engine.open(pack, n_ctx=256, n_threads=1, contexts=2) as engine:
        yield engine


def tokens(engine: Any, mix: str) -> list[int]:
    return list(engine.generate(PROMPT, mix=mix, max_tokens=6).tokens)


def test_nothing_is_loaded_before_it_is_asked_for(engine: Any) -> None:
    assert engine.model.adapters == {}
    tokens(engine, "base")
    assert engine.model.adapters == {}
    tokens(engine, "sentiment")
    assert [a.name for a in engine.model.adapters.values()] == ["sentiment=1"]


def test_a_skill_alone_is_one_adapter_at_any_scale_and_a_blend_another(engine: Any) -> None:
    half, whole = tokens(engine, "sentiment=0.5"), tokens(engine, "sentiment=1")
    assert engine.decoder.adapters.mixes == [Mix.parse("sentiment")]
    blend = tokens(engine, "sentiment=0.5,summarize=0.5")
    assert [str(mix) for mix in engine.decoder.adapters.mixes] == [
        "sentiment=1",
        "sentiment=0.5,summarize=0.5",
    ]
    assert all(len(context.adapters) <= 1 for context in engine.model.contexts)
    assert len({tuple(found) for found in (half, whole, blend)}) == 3


def test_few_stay_and_come_back_the_same(engine: Any) -> None:
    engine.decoder.adapters._size = 2
    mixes = [f"sentiment={i / 8},summarize={1 - i / 8}" for i in range(1, 8)]
    first = [tokens(engine, mix) for mix in mixes]
    assert len(engine.model.adapters) == 2
    assert [tokens(engine, mix) for mix in mixes] == first


def test_a_skill_is_read_once_for_all_scales_of_its_blends(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = AdapterFile.read

    def counted(self: AdapterFile) -> bytes:
        read.append(self.path.name)
        return real(self)

    monkeypatch.setattr(AdapterFile, "read", counted)
    names = [Pack.load(engine.pack.directory).adapter_path(n).name for n in ("sentiment", "summarize")]
    for i in range(1, 8):
        tokens(engine, f"sentiment={i / 8},summarize={1 - i / 8}")
    tokens(engine, "summarize")
    assert read == names
    assert len(engine.decoder.adapters._parts) == 2
    monkeypatch.setattr(adapters, "MIX_PARTS", 1)
    third = tokens(engine, "sentiment=0.3,summarize=0.3")
    assert read == names, "what is there is used"
    engine.decoder.adapters._parts.clear()
    engine.decoder.adapters._size = 1
    tokens(engine, "sentiment=0.2,summarize=0.2")
    assert tokens(engine, "sentiment=0.3,summarize=0.3") == third
    assert read == [*names, *names, *names] and len(engine.decoder.adapters._parts) == 1


def test_a_pack_that_changes_on_disk_takes_nothing_away(engine: Any, pack: Path) -> None:
    with Engine.open(pack, n_ctx=256, n_threads=1) as other:
        before = tokens(other, "sentiment")
    Pack.load(pack).adapter_path("sentiment").unlink()
    assert tokens(engine, "sentiment") == before


def test_a_file_written_into_is_refused(engine: Any, pack: Path) -> None:
    path = Pack.load(pack).adapter_path("sentiment")
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\x00\x7f" * 4)
    with pytest.raises(InvalidArtifact, match="has changed since"):
        tokens(engine, "sentiment")
    assert tokens(engine, "summarize")


def test_a_bad_adapter_is_refused_when_it_is_asked_for_and_the_others_answer(pack: Path) -> None:
    listed = Pack.load(pack)
    path, manifest = listed.adapter_path("sentiment"), pack / "pack.toml"
    content = path.read_bytes()
    bad = content[:-4] + b"\x00\x00\xc0\x7f"  # NaN as float32
    path.write_bytes(bad)
    digests = [hashlib.sha256(each).hexdigest() for each in (content, bad)]
    manifest.write_text(manifest.read_text().replace(*digests))
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        assert tokens(engine, "summarize")
        with pytest.raises(InvalidArtifact, match="not finite"):
            tokens(engine, "sentiment")
        assert tokens(engine, "summarize=0.5")
