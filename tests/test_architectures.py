"""Every architecture: a tiny random base of it, adapters on it, and the same logits as PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import SHAPES, write_base, write_peft

from loramix.architectures import ARCHITECTURES
from loramix.convert.adapter import convert_adapter, read_peft
from loramix.convert.peft import export_peft
from loramix.convert.selfcheck import check, llama_logits, parity
from loramix.errors import Unsupported, WrongBase
from loramix.formats.validate import read_base

BASES: dict[str, dict[str, Any]] = {
    "llama": {"tied": False},
    "llama with biases": {"biases": True},
    "qwen2": {"tied": False},
    "qwen3": {"head": 24, "tied": False},
    "gemma3": {"head": 32},
}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"architecture": request.param.split()[0], **BASES[request.param]}
    return write_base(tmp_path_factory.mktemp("bases") / f"{request.param}.gguf", **options)


def adapter(directory: Path, base: Path, **options: Any) -> tuple[Path, Path]:
    """(GGUF LoRA, PEFT directory) for a base of `BASES`."""
    peft = write_peft(directory / "peft", head=BASES[base.stem].get("head", 16), **options)
    convert_adapter(peft, base, directory / "a.gguf", outtype="f32")
    return directory / "a.gguf", peft


def same(base: Path) -> float:
    """Share of positions with the same choice; Gemma's GELU in float16 can tip a tie in a hundred."""
    return 0.99 if base.stem == "gemma3" else 1.0


def test_every_architecture_is_tried() -> None:
    assert {name.split()[0] for name in BASES} == set(ARCHITECTURES)


@pytest.mark.train
def test_the_bare_base_is_the_same_in_pytorch(base: Path) -> None:
    found = parity(base, [])
    assert found.max_difference <= 1e-3 and found.same_argmax >= same(base)


@pytest.mark.train
@pytest.mark.parametrize(
    "options",
    [
        {"modules": tuple(SHAPES), "size": 0.15},
        {"modules": tuple(SHAPES), "ranks": {"k_proj": 2, "down_proj": 9}, "size": 0.15}
        | {"rank_pattern": {"k_proj": 2, "down_proj": 9}, "alpha_pattern": {"q_proj": 3, "up_proj": 20}},
    ],
    ids=["all matrices", "patterns"],
)
def test_an_adapter_does_what_it_does_in_peft(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    found = check(base, *adapter(tmp_path, base, **options), exact=True)
    assert found.max_difference <= 1e-3
    assert found.same_argmax >= same(base)
    assert found.effect > 0.1


def test_an_export_is_what_was_converted(base: Path, tmp_path: Path) -> None:
    file, peft = adapter(tmp_path, base, modules=tuple(SHAPES))
    export_peft(file.read_bytes(), read_base(base)[1], tmp_path / "back", "a")
    before, after = read_peft(peft), read_peft(tmp_path / "back")
    assert before.pairs.keys() == after.pairs.keys()
    for module, (a, b) in before.pairs.items():
        assert (a == after.pairs[module][0]).all() and (b == after.pairs[module][1]).all()


def test_an_adapter_of_another_architecture_names_both(tmp_path: Path) -> None:
    llama, qwen = write_base(tmp_path / "l.gguf"), write_base(tmp_path / "q.gguf", architecture="qwen2")
    convert_adapter(write_peft(tmp_path / "peft"), llama, tmp_path / "a.gguf")
    with pytest.raises(WrongBase, match=r"'llama'.*'qwen2'"):
        llama_logits(qwen, [(tmp_path / "a.gguf", 1.0)])


def test_an_unknown_architecture_says_which_are_known(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=r"'mamba'.*llama.*qwen2.*qwen3.*gemma3"):
        read_base(path)
