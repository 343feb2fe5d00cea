"""A Llama forward in NumPy with Hugging Face's layout of heads, to hold conversions to: no code of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def logits(base: Path, deltas: Mapping[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """Logits at every position, (T, V) float64.

    Args:
        base: a float32 GGUF of the architecture llama.
        deltas: what is added to a module's weight (out, in), by Hugging Face's name of the module.
        ids: token ids.
    """
    reader = gguf.GGUFReader(base)
    values = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    number = {key: reader.fields[f"llama.{key}"].contents() for key in ("block_count", "rope.freq_base")}
    heads = reader.fields["llama.attention.head_count"].contents()
    heads_kv = reader.fields["llama.attention.head_count_kv"].contents()
    eps = reader.fields["llama.attention.layer_norm_rms_epsilon"].contents()
    x = values["token_embd.weight"][list(ids)]
    size = x.shape[1] // heads
    angles = np.arange(len(ids))[:, None] / number["rope.freq_base"] ** (np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=1) for f in (np.cos, np.sin))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * values[name]

    def rotated(rows: np.ndarray, count: int) -> np.ndarray:
        parts = rows.reshape(len(ids), count, size)
        turned = np.concatenate([-parts[..., size // 2 :], parts[..., : size // 2]], axis=2)
        return parts * cos[:, None] + turned * sin[:, None]

    for layer in range(number["block_count"]):

        def times(x: np.ndarray, module: str, layer: int = layer) -> np.ndarray:
            weight = values[f"blk.{layer}.{NAMES[module]}.weight"]
            if module.endswith(("q_proj", "k_proj")):
                weight = _halves(weight, size)
            return x @ (weight + deltas.get(f"model.layers.{layer}.{module}", 0.0)).T

        h = norm(x, f"blk.{layer}.attn_norm.weight")
        q = rotated(times(h, "self_attn.q_proj"), heads)
        k = np.repeat(rotated(times(h, "self_attn.k_proj"), heads_kv), heads // heads_kv, axis=1)
        v = times(h, "self_attn.v_proj").reshape(len(ids), heads_kv, size)
        v = np.repeat(v, heads // heads_kv, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / size**0.5
        scores[:, np.triu(np.ones((len(ids), len(ids)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        x = x + times(np.einsum("hij,jhd->ihd", weights, v).reshape(len(ids), -1), "self_attn.o_proj")
        h = norm(x, f"blk.{layer}.ffn_norm.weight")
        gate = times(h, "mlp.gate_proj")
        x = x + times(gate / (1 + np.exp(-gate)) * times(h, "mlp.up_proj"), "mlp.down_proj")
    head = values.get("output.weight", values["token_embd.weight"])
    return norm(x, "output_norm.weight") @ head.T


def _halves(weight: np.ndarray, size: int) -> np.ndarray:
    """Rows of Q or K in Hugging Face's order, row by row: first halves of each head, then second halves."""
    found = np.empty_like(weight)
    for row in range(len(weight)):
        head, inside = divmod(row, size)
        i, half = divmod(inside, 2)
        found[head * size + half * (size // 2) + i] = weight[row]
    return found
