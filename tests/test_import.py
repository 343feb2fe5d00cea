"""Adapters from elsewhere: PEFT's, mlx-lm's and llama.cpp's own, held to NumPy, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import llama_numpy
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tiny import SHAPES, write_base, write_mlx, write_peft

from loramix.cli import main
from loramix.convert.adapter import convert_adapter, read_adapter, to_gguf
from loramix.convert.mlx import read_mlx
from loramix.convert.peft import as_peft, export_peft
from loramix.convert.peft_reader import read_peft
from loramix.convert.selfcheck import llama_logits
from loramix.errors import InvalidArtifact, LoramixError, NotFound, Unsupported, WrongBase
from loramix.formats.validate import check_adapter, read_base
from loramix.models.fuse import fuse, read_pairs

TEXT = ["The hall holds 900."]
BASES = {
    "grouped, tied": {"n_head_kv": 2, "tied": True},
    "grouped, untied": {"n_head_kv": 2, "tied": False},
    "one KV head per head, tied": {"n_head_kv": 4, "tied": True},
    "one KV head per head, untied": {"n_head_kv": 4, "tied": False},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain, all seven": {"modules": tuple(SHAPES), "r": 5, "size": 0.15},
    "rsLoRA": {"use_rslora": True, "r": 9, "size": 0.15},
    "patterns": {
        "ranks": {"k_proj": 2, "o_proj": 20},
        "rank_pattern": {"k_proj": 2, "o_proj": 20},
        "alpha_pattern": {"q_proj": 3, "model.layers.1.self_attn.v_proj": 40},
    },
    "q only": {"modules": ("q_proj",)},
}


pytestmark = pytest.mark.usefixtures("light_native_code")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bases")
    return {
        name: write_base(directory / f"{i}.gguf", **options)  # type: ignore[arg-type]
        for i, (name, options) in enumerate(BASES.items())
    }


def by_hand(directory: Path, alphas: dict[str, float], rslora: bool = False) -> dict[str, np.ndarray]:
    """alpha / r x B A of each module of a PEFT directory, alphas by the end of the module's name."""
    tensors = load_file(directory / "adapter_model.safetensors")
    deltas = {}
    for key, a in tensors.items():
        if "lora_A" not in key:
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next((alpha for end, alpha in alphas.items() if module.endswith(end)), 8.0)
        scaling = alpha / (a.shape[0] ** 0.5 if rslora else a.shape[0])
        deltas[module] = scaling * tensors[key.replace("lora_A", "lora_B")].astype("f8") @ a.astype("f8")
    return deltas


def differs(base: Path, adapter: Path, deltas: dict[str, np.ndarray]) -> float:
    """Largest difference of llama.cpp's logits to NumPy's; the adapter must matter too."""
    (ours,), (ids,) = llama_logits(base, [(adapter, 1.0)], TEXT)
    theirs, bare = (llama_numpy.logits(base, what, ids) for what in (deltas, {}))
    assert np.abs(theirs - bare).max() > 0.1
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapters_compute_what_numpy_does(
    base: str, kind: str, made: dict[str, Path], tmp_path: Path
) -> None:
    peft = write_peft(tmp_path / "peft", n_head_kv=BASES[base]["n_head_kv"], **KINDS[kind])
    convert_adapter(peft, made[base], tmp_path / "a.gguf", outtype="f32")
    alphas = KINDS[kind].get("alpha_pattern", {})
    deltas = by_hand(peft, alphas, KINDS[kind].get("use_rslora", False))
    assert differs(made[base], tmp_path / "a.gguf", deltas) < 1e-3


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_mlx_adapters_compute_what_numpy_does(kind: type, made: dict[str, Path], tmp_path: Path) -> None:
    base = made["grouped, untied"]
    mlx = write_mlx(tmp_path / "mlx", kind=kind, scale=10.0)
    convert_adapter(mlx, base, tmp_path / "a.gguf", outtype="f32")
    tensors = load_file(mlx / "adapters.safetensors")
    deltas = {
        key.removesuffix(".lora_a"): 10.0 * (a.astype("f8") @ tensors[key[:-1] + "b"].astype("f8")).T
        for key, a in tensors.items()
        if key.endswith(".lora_a")
    }
    assert len(deltas) == 2 * 3
    assert differs(base, tmp_path / "a.gguf", deltas) < 1e-3


@pytest.mark.train
def test_the_command_checks_an_mlx_adapter_against_pytorch(tiny_base: Path, tmp_path: Path) -> None:
    mlx = write_mlx(tmp_path / "mlx", scale=5.0)
    words = ["convert", "adapter", str(mlx), "-o", str(tmp_path / "a.gguf"), "--base", str(tiny_base)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "as in PyTorch" in result.stderr


def test_peft_to_gguf_and_back_keeps_every_bit(made: dict[str, Path], tmp_path: Path) -> None:
    """One scaling for all matrices is no reason to touch one of them."""
    base = made["grouped, untied"]
    for i, kind in enumerate(("plain, all seven", "rsLoRA", "q only")):
        peft = write_peft(tmp_path / f"peft{i}", **KINDS[kind])
        convert_adapter(peft, base, tmp_path / f"{i}.gguf", outtype="f32")
        export_peft((tmp_path / f"{i}.gguf").read_bytes(), read_base(base)[1], tmp_path / f"back{i}", "a")
        before, after = (load_file(d / "adapter_model.safetensors") for d in (peft, tmp_path / f"back{i}"))
        assert before.keys() == after.keys()
        assert all(before[key].tobytes() == after[key].tobytes() for key in before), kind
        ours, theirs = read_peft(tmp_path / f"back{i}").scaling, read_peft(peft).scaling
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_mlx_to_peft_keeps_every_bit(tmp_path: Path) -> None:
    mlx = write_mlx(tmp_path / "mlx", scale=20.0, r=6)
    source = load_file(mlx / "adapters.safetensors")
    with as_peft(mlx) as peft:
        found = read_peft(peft)
    assert set(found.scaling.values()) == {20.0}
    for module, (a, b) in found.pairs.items():
        assert np.array_equal(a, source[f"{module}.lora_a"].T)
        assert np.array_equal(b, source[f"{module}.lora_b"].T)
    with as_peft(peft) as same:
        assert same == peft, "what is PEFT's already is not copied"


GOLDEN = {
    "self_attn.q_proj": "blk.2.attn_q.weight",
    "self_attn.k_proj": "blk.2.attn_k.weight",
    "self_attn.v_proj": "blk.2.attn_v.weight",
    "self_attn.o_proj": "blk.2.attn_output.weight",
    "mlp.gate_proj": "blk.2.ffn_gate.weight",
    "mlp.up_proj": "blk.2.ffn_up.weight",
    "mlp.down_proj": "blk.2.ffn_down.weight",
}


@pytest.mark.parametrize("made_by", ["PEFT", "mlx-lm"])
def test_names_of_tensors(made_by: str, tiny_base: Path, tmp_path: Path) -> None:
    for module, tensor in GOLDEN.items():
        if made_by == "PEFT":
            source = write_peft(tmp_path / module, modules=(module.partition(".")[2],))
        else:
            source = write_mlx(tmp_path / module, modules=(module,), layers=(2,))
        tensors, _ = to_gguf(read_adapter(source), read_base(tiny_base)[1])
        assert {f"{tensor}.lora_a", f"{tensor}.lora_b"} <= tensors.keys()
        assert len(tensors) == (6 if made_by == "PEFT" else 2)


def theirs(path: Path, *, alpha: float | None, kinds: tuple[str, str] = ("F32", "F32"), **names: str) -> Path:
    """A GGUF LoRA as llama.cpp's converter writes it, ranks 32 so that Q8_0 has whole blocks."""
    rng = np.random.default_rng(4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_name("theirs")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in names.items():
        writer.add_string(key.replace("__", "."), value)
    for target, shape in (("blk.0.attn_v", SHAPES["v_proj"]), ("blk.2.ffn_up", SHAPES["up_proj"])):
        for half, size, kind in (("a", (32, shape[1]), kinds[0]), ("b", (shape[0], 32), kinds[1])):
            wanted = gguf.GGMLQuantizationType[kind]
            packed = gguf.quants.quantize(rng.normal(0, 0.1, size).astype(np.float32), wanted)
            writer.add_tensor(f"{target}.weight.lora_{half}", packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kinds", [("F32", "F32"), ("F16", "BF16"), ("Q8_0", "F16"), ("Q8_0", "Q8_0")])
@pytest.mark.parametrize("alpha", [64.0, None])
def test_llama_cpps_own_adapters(
    alpha: float | None, kinds: tuple[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    """Fused at some scale, they do what llama.cpp does with the file itself; no alpha means no alpha / rank."""
    own = theirs(tmp_path / "own.gguf", alpha=alpha, kinds=kinds)
    assert check_adapter(own.read_bytes(), read_base(tiny_base)[1], "own").alpha == alpha
    (tmp_path / "fused.gguf").write_bytes(fuse([(own.read_bytes(), 0.5)]))
    (ours,), _ = llama_logits(tiny_base, [(tmp_path / "fused.gguf", 1.0)], TEXT)
    (llamas,), _ = llama_logits(tiny_base, [(own, 0.5)], TEXT)
    (bare,), _ = llama_logits(tiny_base, [], TEXT)
    moved = np.abs(llamas - bare).max()
    assert moved > 0.1
    # llama.cpp rounds what it multiplies with such a matrix to the matrix's type; F32 alone is exact
    assert np.abs(ours - llamas).max() < (1e-3 if kinds == ("F32", "F32") else 0.05 * moved)


def test_no_alpha_becomes_the_rank(tiny_base: Path, tmp_path: Path) -> None:
    own = theirs(tmp_path / "own.gguf", alpha=None)
    export_peft(own.read_bytes(), read_base(tiny_base)[1], tmp_path / "peft", "own")
    assert set(read_peft(tmp_path / "peft").scaling.values()) == {1.0}
    assert {scaling for *_, scaling in read_pairs(own.read_bytes()).values()} == {1.0}


def test_packs_take_llama_cpps_own_adapters(pack: Path, tmp_path: Path) -> None:
    own = theirs(tmp_path / "own.gguf", alpha=None, kinds=("Q8_0", "F16"))
    words = ["pack", "add", str(pack), "own", str(own), "--description", "theirs", "--max-tokens", "8"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["run", "--pack", str(pack), "--mix", "own", "-n", "2", "Hello"])
    assert result.exit_code == 0, result.output


def test_a_gguf_adapter_of_another_base_is_named(tmp_path: Path) -> None:
    wide = write_base(tmp_path / "base.gguf", n_head_kv=4)
    own = theirs(tmp_path / "own.gguf", alpha=8.0, general__base_model__0__name="Llama 3.2 1B")
    with pytest.raises(WrongBase, match=r"32 x 64, the base's 64 x 64: it is for Llama 3\.2 1B"):
        check_adapter(own.read_bytes(), read_base(wide)[1], "own")


def edited(directory: Path, change: Any) -> Path:
    """An adapter whose tensors are changed."""
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return directory


def test_peft_adapters_that_are_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    stem = "base_model.model.model"
    extra = {
        f"{stem}.layers.0.self_attn.q_proj.lora_magnitude_vector": (np.ones(64, np.float32), "DoRA"),
        f"{stem}.embed_tokens.weight": (np.ones((301, 64), np.float32), "301 tokens"),
        f"{stem}.embed_tokens.lora_embedding_A": (np.ones((4, 259), np.float32), "embeddings"),
    }
    for i, (key, (tensor, says)) in enumerate(extra.items()):
        source = write_peft(tmp_path / f"extra{i}")
        edited(source, lambda tensors, key=key, tensor=tensor: tensors.update({key: tensor}))
        with pytest.raises(Unsupported, match=says):
            convert_adapter(source, tiny_base, tmp_path / "a.gguf")
    configs: dict[str, tuple[dict[str, Any], type[LoramixError]]] = {
        "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, Unsupported),
        "olora": ({"init_lora_weights": "olora"}, Unsupported),
        "kasa_config": ({"kasa_config": {"x": 1}}, Unsupported),
        "LOHA": ({"peft_type": "LOHA"}, Unsupported),
        "alpha_pattern": ({"alpha_pattern": {"(": 3}}, InvalidArtifact),
    }
    for says, (config, error) in configs.items():
        with pytest.raises(error, match=says):
            convert_adapter(write_peft(tmp_path / says, **config), tiny_base, tmp_path / "a.gguf")
    read_peft(write_peft(tmp_path / "gaussian", init_lora_weights="gaussian"))
    assert not list(tmp_path.glob("*.gguf"))


def test_ranks_that_are_none(tmp_path: Path) -> None:
    def none(tensors: dict[str, np.ndarray]) -> None:
        for key, tensor in tensors.items():
            tensors[key] = tensor[:0] if "lora_A" in key else tensor[:, :0]

    with pytest.raises(InvalidArtifact, match="ranks differ"):
        read_peft(edited(write_peft(tmp_path / "peft"), none))


def test_adapters_of_another_base_are_named(made: dict[str, Path], tmp_path: Path) -> None:
    base, out = made["one KV head per head, untied"], tmp_path / "a.gguf"
    grouped = write_peft(tmp_path / "peft", base_model_name_or_path="someone/llama-x")
    with pytest.raises(WrongBase, match="'someone/llama-x'"):
        convert_adapter(grouped, base, out)
    with pytest.raises(WrongBase, match="'someone/tiny-mlx'"):
        convert_adapter(write_mlx(tmp_path / "mlx"), base, out)

    nameless = write_peft(tmp_path / "nameless", base_model_name_or_path="None")
    with pytest.raises(WrongBase, match="another base, this base"):
        convert_adapter(nameless, base, out)

    def with_head(tensors: dict[str, np.ndarray]) -> None:
        tensors.clear()
        tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((4, 64), np.float32)
        tensors["base_model.model.lm_head.lora_B.weight"] = np.ones((300, 4), np.float32)

    with pytest.raises(WrongBase, match="300 tokens, the base's vocabulary has 259"):
        convert_adapter(edited(grouped, with_head), base, out)
    assert not out.exists()


MLX_REFUSED: dict[str, tuple[dict[str, Any], type[LoramixError], str]] = {
    "DoRA": ({"fine_tune_type": "dora"}, Unsupported, "'dora'"),
    "full": ({"fine_tune_type": "full"}, Unsupported, "'full'"),
    "alpha": ({"lora_parameters": {"rank": 4, "alpha": 16, "scale": 10.0}}, Unsupported, "alpha"),
    "no scale": ({"lora_parameters": {"rank": 4}}, InvalidArtifact, "scale .* is None"),
    "bad scale": ({"lora_parameters": {"scale": -1}}, InvalidArtifact, "scale .* is -1"),
    "no parameters": ({"lora_parameters": None}, InvalidArtifact, "no lora_parameters"),
}


@pytest.mark.parametrize("name", MLX_REFUSED)
def test_mlx_configurations_that_are_refused(name: str, tmp_path: Path) -> None:
    config, error, says = MLX_REFUSED[name]
    with pytest.raises(error, match=says):
        read_mlx(write_mlx(tmp_path / "mlx", **config))


def test_damaged_mlx_adapters(tmp_path: Path) -> None:
    stem = "model.layers.1.self_attn.q_proj"
    changes = {
        "lacks one of its two matrices": lambda tensors: tensors.pop(f"{stem}.lora_b"),
        "ranks differ": lambda tensors: tensors.update({f"{stem}.lora_b": np.ones((5, 64), np.float32)}),
        "magnitudes": lambda tensors: tensors.update({f"{stem}.m": np.ones(64, np.float32)}),
        "an embedding": lambda tensors: tensors.update(
            {f"model.embed_tokens.lora_{half}": np.ones((4, 4), np.float32) for half in "ab"}
        ),
        "no LoRA matrices": lambda tensors: tensors.clear(),
    }
    for says, change in changes.items():
        with pytest.raises(LoramixError, match=says):
            read_mlx(edited(write_mlx(tmp_path / says), change))
    lone = write_mlx(tmp_path / "lone")
    (lone / "adapter_config.json").unlink()
    with pytest.raises(NotFound, match=r"adapter_config\.json"):
        read_mlx(lone)
    (lone / "adapters.safetensors").rename(lone / "adapters.npz")
    with pytest.raises(Unsupported, match=r"adapters\.npz"):
        read_adapter(lone)
    (tmp_path / "list").mkdir()
    (write_mlx(tmp_path / "list") / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(InvalidArtifact, match="not an object"):
        read_mlx(tmp_path / "list")
