"""The architectures that Loramix runs: one description each, read by everything that depends on one.

Knows names and conventions only; nothing here reads a file or imports llama.cpp, PyTorch or ``gguf``.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    checkpoints: tuple[str, ...] = ()
    """``architectures`` of config.json whose checkpoints can be converted; none if only GGUF files can be used."""
    permuted_qk: bool = False
    """llama.cpp's converter interleaves the two halves of each head's rows of Q and K (conversion/llama.py)."""
    norm_offset: float = 0.0
    """Added to each norm's weight in a GGUF; transformers adds it when it computes."""
    taps_layer_inputs: bool = False
    """llama.cpp keeps the inputs of its layers on request (``t_layer_inp`` in src/models)."""
    qkv_bias: bool = False
    """Q, K and V always have biases."""
    merges_vision: bool = False
    """Checkpoints that also see images keep the language model under ``language_model``."""

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
            n_head, n_head_kv: the base's.
        """
        part = tensor.split(".")[2] if tensor.startswith("blk.") else ""
        return {"attn_q": n_head, "attn_k": n_head_kv}.get(part, 0) if self.permuted_qk else 0


_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "llama",
            "Llama, Mistral, SmolLM2, TinyLlama",
            "llama",
            "LlamaForCausalLM",
            _NORMS,
            checkpoints=("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"),
            permuted_qk=True,
            taps_layer_inputs=True,
        ),
        Architecture(
            "qwen2",
            "Qwen2, Qwen2.5",
            "qwen2",
            "Qwen2ForCausalLM",
            _NORMS,
            checkpoints=("Qwen2ForCausalLM",),
            qkv_bias=True,
        ),
        Architecture(
            "qwen3",
            "Qwen3",
            "qwen3",
            "Qwen3ForCausalLM",
            _NORMS | _QK_NORMS,
            checkpoints=("Qwen3ForCausalLM",),
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
            merges_vision=True,
        ),
    )
}


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
