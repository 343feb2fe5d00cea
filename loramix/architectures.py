"""Descriptions of the supported architectures, shared by all code that depends on the architecture.

Holds names and conventions only; reads no file and imports no llama.cpp, PyTorch or ``gguf``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loramix.errors import Unsupported

LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""GGUF's name of each matrix of a layer that an adapter may change, by transformers' name of the module."""
EMBEDDINGS = {"model.embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
"""GGUF tensor of the two matrices that are as long as the vocabulary; no adapter may change them."""


_ATTENTION = tuple(module for module in LINEAR if module.startswith("self_attn."))
_MLP = tuple(module for module in LINEAR if module.startswith("mlp."))


@dataclass(frozen=True, slots=True)
class CheckpointClass:
    """A class of transformers whose checkpoints hold an architecture."""

    name: str
    """As ``architectures`` of config.json names it."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Settings that its configuration takes where config.json lacks them and LlamaConfig takes others."""
    window_setting: str = ""
    """Setting that turns a sliding window on; empty where no setting does."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture names, orders and computes what differs between them."""

    name: str
    """Value of the GGUF key ``general.architecture``."""
    label: str
    """What people call its models."""
    model_type: str
    """transformers' ``model_type`` of the causal language model."""
    model_class: str
    """transformers' class of that model."""
    norms: dict[str, str]
    """GGUF's name of each norm of a layer, by transformers' name of the module."""
    bias_settings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting of transformers that says whether matrices of each layer have a bias, with their modules."""
    biases: tuple[str, ...] = ()
    """Modules of each layer that always have a bias."""
    no_bias: tuple[str, ...] = ()
    """Modules of each layer whose bias llama.cpp does not load, whatever the settings allow."""
    own_head_width: bool = True
    """llama.cpp takes heads of another width than the model's width divided by the heads."""
    checkpoints: tuple[CheckpointClass, ...] = ()
    """Classes whose checkpoints can be converted to a GGUF base."""
    gguf_only: tuple[str, ...] = ()
    """Classes of its checkpoints that cannot be converted: a base of them comes as GGUF."""
    permuted_qk: bool = False
    """llama.cpp's converter interleaves the two halves of each head's rows of Q and K (conversion/llama.py)."""
    norm_offset: float = 0.0
    """Added to each norm's weight in a GGUF; transformers adds it when it computes."""
    logit_tolerance: float = 1e-3
    """Largest difference of a float32 base's logits between llama.cpp and PyTorch that a self-check accepts."""
    taps_layer_inputs: bool = False
    """llama.cpp keeps the inputs of its layers on request (``t_layer_inp`` in src/models)."""
    embedding_node: str = "embd"
    """llama.cpp's name of the graph node that is the input of layer 0."""
    sliding_period: int = 0
    """Each so-many-th layer sees all tokens, the others a sliding window; 0 where all see all."""

    @property
    def classes(self) -> set[str]:
        """All classes of transformers that are known to hold it."""
        return {self.model_class, *self.gguf_only, *(found.name for found in self.checkpoints)}

    def modules(self, n_layer: int) -> dict[str, str]:
        """GGUF tensor of each matrix that an adapter may change, by transformers' module name.

        Args:
            n_layer: layers of the base.
        """
        return {
            f"model.layers.{layer}.{module}": f"blk.{layer}.{tensor}.weight"
            for layer in range(n_layer)
            for module, tensor in LINEAR.items()
        }

    def heads(self, tensor: str, n_head: int, n_head_kv: int) -> int:
        """Heads into whose halves a tensor's rows are interleaved; 0 if its rows keep transformers' order.

        Args:
            tensor: GGUF name, e.g. ``blk.0.attn_q.weight``.
            n_head: heads of the base.
            n_head_kv: its key-value heads.
        """
        part = tensor.split(".")[2] if tensor.startswith("blk.") else ""
        return {"attn_q": n_head, "attn_k": n_head_kv}.get(part, 0) if self.permuted_qk else 0


_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
# what transformers' configurations of these models take where a file is silent
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
            # llama.cpp looks GELU up in a float16 table: 0.020 was measured on Gemma 3 270M, with a mean KL of 4e-7
            logit_tolerance=0.05,
            gguf_only=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            embedding_node="inp_scaled",
            sliding_period=6,
        ),
    )
}


def checkpoint_class(name: str) -> tuple[Architecture, CheckpointClass] | None:
    """The architecture that a class of transformers holds, and the class; None where it cannot be converted.

    Args:
        name: of the class, as ``architectures`` of config.json has it.
    """
    for kind in ARCHITECTURES.values():
        for found in kind.checkpoints:
            if found.name == name:
                return kind, found
    return None


def architecture(name: str, where: str) -> Architecture:
    """The description of an architecture.

    Args:
        name: value of ``general.architecture``.
        where: the file or repository that has it, for the message.

    Raises:
        Unsupported: none of `ARCHITECTURES`.
    """
    found = ARCHITECTURES.get(name)
    if found is None:
        known = ", ".join(f"{known.name} ({known.label})" for known in ARCHITECTURES.values())
        raise Unsupported(
            f"{where} is of architecture {name[:40]!r}, which Loramix does not run; it runs {known}."
        )
    return found
