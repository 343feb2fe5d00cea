"""Descriptions of the supported architectures, shared by all code that depends on the architecture.

Contains only names and conventions; reads no files and does not import llama.cpp, PyTorch or ``gguf``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loramix.errors import Unsupported

Module: TypeAlias = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Name of a linear layer that an adapter can change."""
LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""GGUF names of the matrices of a layer that an adapter may change, by transformers' module names."""
EMBEDDINGS = {"model.embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
"""GGUF names of the two vocabulary-sized matrices, which an adapter must not change."""


_ATTENTION = tuple(module for module in LINEAR if module.startswith("self_attn."))
_MLP = tuple(module for module in LINEAR if module.startswith("mlp."))


@dataclass(frozen=True, slots=True)
class CheckpointClass:
    """A class of transformers with checkpoints of an architecture."""

    name: str
    """Name in ``architectures`` of config.json."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Defaults of its configuration that differ from those of LlamaConfig."""
    window_setting: str = ""
    """Setting that enables sliding windows; empty if there is none."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The names, orders and conventions in which an architecture differs from others."""

    name: str
    """Value of the GGUF key ``general.architecture``."""
    label: str
    """Usual name of its models."""
    model_type: str
    """transformers' ``model_type`` of the causal language model."""
    model_class: str
    """transformers' class of that model."""
    norms: dict[str, str]
    """GGUF names of the norms of a layer, by transformers' module names."""
    bias_settings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Settings of transformers that enable biases, with the modules that get them."""
    biases: tuple[str, ...] = ()
    """Modules of each layer that always have a bias."""
    no_bias: tuple[str, ...] = ()
    """Modules of each layer whose bias llama.cpp does not load."""
    own_head_width: bool = True
    """Whether llama.cpp supports heads of another width than the model's width divided by the number of heads."""
    checkpoints: tuple[CheckpointClass, ...] = ()
    """Classes with checkpoints that can be converted to a GGUF base."""
    gguf_only: tuple[str, ...] = ()
    """Classes with checkpoints that cannot be converted; their bases are available only as GGUF."""
    permuted_qk: bool = False
    """Whether llama.cpp's converter interleaves the halves of each head's rows of Q and K (conversion/llama.py)."""
    norm_offset: float = 0.0
    """Value added to each norm's weight in a GGUF; transformers adds it in the computation."""
    logit_tolerance: float = 1e-3
    """Maximum difference between llama.cpp's and PyTorch's logits of a float32 base in a self-check."""
    taps_layer_inputs: bool = False
    """Whether llama.cpp can return the inputs of its layers (``t_layer_inp`` in src/models)."""
    embedding_node: str = "embd"
    """llama.cpp's name for the graph node that is the input of layer 0."""
    sliding_period: int = 0
    """Every n-th layer attends to all tokens, the others to a sliding window; 0 if all layers attend to all tokens."""

    @property
    def classes(self) -> set[str]:
        """All known classes of transformers of this architecture."""
        return {self.model_class, *self.gguf_only, *(found.name for found in self.checkpoints)}

    def modules(self, n_layer: int) -> dict[str, str]:
        """Return the GGUF names of the matrices that an adapter may change, by transformers' module names.

        Args:
            n_layer: number of layers of the base.
        """
        return {
            f"model.layers.{layer}.{module}": f"blk.{layer}.{tensor}.weight"
            for layer in range(n_layer)
            for module, tensor in LINEAR.items()
        }

    def heads(self, tensor: str, n_head: int, n_head_kv: int) -> int:
        """Return the number of heads with interleaved halves in a tensor's rows; 0 if the order is transformers'.

        Args:
            tensor: GGUF name, e.g. ``blk.0.attn_q.weight``.
            n_head: number of heads of the base.
            n_head_kv: number of its key-value heads.
        """
        part = tensor.split(".")[2] if tensor.startswith("blk.") else ""
        return {"attn_q": n_head, "attn_k": n_head_kv}.get(part, 0) if self.permuted_qk else 0


_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
# defaults of transformers' configurations of these models
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "llama",
            "Llama, Mistral, SmolLM2, TinyLlama",
            "llama",
            "LlamaForCausalLM",
            _NORMS,
            bias_settings={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
            checkpoints=(
                CheckpointClass("LlamaForCausalLM"),
                CheckpointClass("LLaMAForCausalLM"),
                CheckpointClass("MistralForCausalLM", _MISTRAL, "sliding_window"),
            ),
            permuted_qk=True,
            taps_layer_inputs=True,
        ),
        Architecture(
            "qwen2",
            "Qwen2, Qwen2.5",
            "qwen2",
            "Qwen2ForCausalLM",
            _NORMS,
            biases=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            own_head_width=False,
            checkpoints=(CheckpointClass("Qwen2ForCausalLM", _QWEN, "use_sliding_window"),),
        ),
        Architecture(
            "qwen3",
            "Qwen3",
            "qwen3",
            "Qwen3ForCausalLM",
            _NORMS | _QK_NORMS,
            bias_settings={"attention_bias": _ATTENTION},
            no_bias=("self_attn.o_proj",),
            checkpoints=(
                CheckpointClass("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, "use_sliding_window"),
            ),
            taps_layer_inputs=True,
        ),
        Architecture(
            "gemma3",
            "Gemma 3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            {
                "input_layernorm": "attn_norm",
                "post_attention_layernorm": "post_attention_norm",
                "pre_feedforward_layernorm": "ffn_norm",
                "post_feedforward_layernorm": "post_ffw_norm",
            }
            | _QK_NORMS,
            norm_offset=1.0,
            # llama.cpp uses a float16 table for GELU: 0.020 was measured on Gemma 3 270M, with a mean KL of 4e-7
            logit_tolerance=0.05,
            gguf_only=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            embedding_node="inp_scaled",
            sliding_period=6,
        ),
    )
}


def checkpoint_class(name: str) -> tuple[Architecture, CheckpointClass] | None:
    """Return the architecture of a class of transformers, and the class; None if it cannot be converted.

    Args:
        name: name of the class in ``architectures`` of config.json.
    """
    for kind in ARCHITECTURES.values():
        for found in kind.checkpoints:
            if found.name == name:
                return kind, found
    return None


def architecture(name: str, where: str) -> Architecture:
    """Return the description of an architecture.

    Args:
        name: value of ``general.architecture``.
        where: file or repository, for the message.

    Raises:
        Unsupported: the name is not in `ARCHITECTURES`.
    """
    found = ARCHITECTURES.get(name)
    if found is None:
        known = ", ".join(f"{known.name} ({known.label})" for known in ARCHITECTURES.values())
        raise Unsupported(
            f"{where} has architecture {name[:40]!r}, which Loramix does not support; supported: {known}."
        )
    return found
