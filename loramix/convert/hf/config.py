"""Settings of a Hugging Face checkpoint, and the tensors that they require.

Independent of the tensor files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from loramix.architectures import ARCHITECTURES, LINEAR, Architecture, checkpoint_class
from loramix.errors import InvalidArtifact, NotFound, Unsupported
from loramix.formats.textfile import read_text

ROPE_TYPES = ("default", "linear", "llama3")
_OTHERS = (
    (r"Moe|MoE|Mixtral", "a mixture of experts"),
    (r"VL|Vision|Audio|Omni|ForConditionalGeneration", "which is not a text-only model"),
    (
        r"ForSequenceClassification|ForTokenClassification|ForQuestionAnswering",
        "which does not generate text",
    ),
)
MAX_JSON = 64 * 2**20
Count = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
T = TypeVar("T")


class Rope(msgspec.Struct):
    """``rope_parameters``, or ``rope_scaling`` of older checkpoints (transformers, modeling_rope_utils.py)."""

    rope_type: str = ""
    type: str = ""
    """The older name of ``rope_type``."""
    rope_theta: Positive | None = None
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: float = 1.0


class Config(msgspec.Struct):
    """The settings in ``config.json`` that affect computation; names and defaults as in LlamaConfig.

    Defaults of other configurations are in `loramix.architectures`.
    """

    architectures: list[str]
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    num_attention_heads: Count
    vocab_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    max_window_layers: int = 0
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def model(self) -> Architecture:
        """The architecture of the checkpoint."""
        found = checkpoint_class(self.architectures[0])
        assert found  # checked by read_config
        return found[0]

    @property
    def n_head_kv(self) -> int:
        """Number of key-value heads; by default the number of heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> Rope:
        """Rotary settings, with type and base filled in."""
        found = self.rope_parameters or self.rope_scaling or Rope()
        kind = found.rope_type or found.type or "default"
        return msgspec.structs.replace(found, rope_type=kind, rope_theta=found.rope_theta or self.rope_theta)


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file of a checkpoint.

    Args:
        path: the file.
        kind: type to decode it to.

    Raises:
        NotFound: the file does not exist.
        InvalidArtifact: it is larger than `MAX_JSON`, not JSON, or not of the type.
    """
    try:
        size = path.stat().st_size if path.is_file() else -1
        if size < 0:
            raise NotFound(f"no {path.name} in {path.parent}; download the whole checkpoint.")
        if size > MAX_JSON:
            raise InvalidArtifact(f"{path} has {size} bytes, the limit is {MAX_JSON}; download it again.")
        return msgspec.json.decode(read_text(path, InvalidArtifact), type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidArtifact(f"{path} cannot be used ({error}); download it again.") from None


def read_config(directory: Path) -> Config:
    """Read and check ``config.json``.

    Args:
        directory: the checkpoint.

    Raises:
        NotFound: the directory or file does not exist.
        InvalidArtifact: the file is damaged, or has inconsistent numbers.
        Unsupported: another architecture, or a setting that this conversion does not support.
    """
    if not directory.is_dir():
        raise NotFound(f"no directory {directory}; give one that contains a checkpoint's config.json.")
    path = directory / "config.json"
    settings = read_json(path, dict[str, Any])
    named = settings.get("architectures")
    name = str(named[0]) if isinstance(named, list) and len(named) == 1 else ""
    found = checkpoint_class(name)
    if found is None:
        what = ", ".join(map(str, named)) if isinstance(named, list) and named else "no architecture"
        known = ", ".join(kind.name for known in ARCHITECTURES.values() for kind in known.checkpoints)
        raise Unsupported(f"{path} names {what[:80]}{_why_not(name)}; supported: {known}.")
    model, kind = found
    settings = {**kind.defaults, **settings}
    try:
        config = msgspec.convert(settings, Config)
    except msgspec.MsgspecError as error:
        raise InvalidArtifact(f"{path} cannot be used ({error}); download it again.") from None
    width = config.hidden_size // config.num_attention_heads
    rope = config.rope
    for refused, why in (
        (config.quantization_config, "it is quantized already; convert the original in full precision"),
        (config.hidden_act != "silu", f"its activation is {config.hidden_act!r}, llama.cpp has 'silu'"),
        (
            rope.rope_type not in ROPE_TYPES,
            f"its RoPE is {rope.rope_type!r}; supported: {', '.join(ROPE_TYPES)}",
        ),
        (rope.partial_rotary_factor != 1.0, "it rotates only a part of each head (partial_rotary_factor)"),
        (
            settings.get(kind.window_setting) and _is_windowed(config),
            f"some of its layers attend to {config.sliding_window} of {config.max_position_embeddings} tokens "
            f"({kind.window_setting}), in llama.cpp they attend to all",
        ),
        (
            not model.own_head_width and config.head_size != width,
            f"its heads are {config.head_size} wide (head_dim), llama.cpp needs {width} for {model.label}",
        ),
        (
            unread := [module for module in biased(config, model) if module in model.no_bias],
            f"it has a bias on {', '.join(unread)}, which llama.cpp does not load for {model.label}",
        ),
    ):
        if refused:
            raise Unsupported(f"{directory} cannot be converted: {why}.")
    if rope.rope_type == "llama3" and (
        not rope.original_max_position_embeddings or rope.low_freq_factor >= rope.high_freq_factor
    ):
        raise InvalidArtifact(
            f"{path}: llama3 RoPE needs original_max_position_embeddings and low < high factor; download it again."
        )
    heads, kv, size = config.num_attention_heads, config.n_head_kv, config.head_size
    if heads % kv or size % 2 or (config.head_dim is None and config.hidden_size % heads):
        raise InvalidArtifact(
            f"{path}: {heads} heads, {kv} key-value heads and a width of {config.hidden_size} do not match; "
            "download it again."
        )
    return config


def _why_not(name: str) -> str:
    """Explain why a class cannot be converted, as a clause for an error message."""
    if any(name in kind.gguf_only for kind in ARCHITECTURES.values()):
        return ", which cannot be converted: pull a GGUF of it with 'loramix pull OWNER/REPO'"
    for pattern, what in _OTHERS:
        if re.search(pattern, name):
            return f", {what}"
    return ""


def _is_windowed(config: Config) -> bool:
    """Whether a layer attends to fewer tokens than the context has if sliding windows are enabled."""
    if not config.sliding_window or config.sliding_window >= config.max_position_embeddings:
        return False
    if config.layer_types is not None:
        return "sliding_attention" in config.layer_types
    return config.max_window_layers < config.num_hidden_layers


def biased(config: Config, model: Architecture) -> list[str]:
    """Return the modules of each layer that have a bias.

    Args:
        config: settings from `read_config`.
        model: the architecture of the checkpoint.
    """
    found = set(model.biases)
    for setting, modules in model.bias_settings.items():
        if getattr(config, setting):
            found |= set(modules)
    return [module for module in LINEAR if module in found]


def expected(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint with these settings has, by name.

    Args:
        config: settings from `read_config`.
    """
    width, inner, model = config.hidden_size, config.intermediate_size, config.model
    q, kv = config.num_attention_heads * config.head_size, config.n_head_kv * config.head_size
    linear = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    with_bias = biased(config, model)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        for module, shape in linear.items():
            shapes[f"{stem}.{module}.weight"] = shape
            if module in with_bias:
                shapes[f"{stem}.{module}.bias"] = shape[:1]
        for module in model.norms:
            # norms within attention apply to one head
            size = config.head_size if module.startswith("self_attn.") else width
            shapes[f"{stem}.{module}.weight"] = (size,)
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def rope_factors(config: Config) -> npt.NDArray[np.float32] | None:
    """Return the divisor of each frequency under llama3 scaling, (head / 2,) float32; None without scaling.

    As in llama.cpp's converter (conversion/llama.py, ``generate_extra_tensors``).
    """
    rope = config.rope
    if rope.rope_type != "llama3":
        return None
    assert rope.rope_theta and rope.original_max_position_embeddings  # filled in by read_config
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    wavelengths = 2 * np.pi * np.power(np.float32(rope.rope_theta), exponents, dtype=np.float32)
    low, high, context = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope.factor + smooth)
    factors = np.where(
        wavelengths < context / high, 1.0, np.where(wavelengths > context / low, rope.factor, between)
    )
    return factors.astype(np.float32)
