"""Prediction of the memory and disk that a base, its skills and a context need, without loading them.

Adds up sizes from the GGUF header and of the runtime's data; does not load llama.cpp. The formulas follow llama.cpp
(src/llama-kv-cache.cpp, ggml/src/ggml-alloc.c) and are compared with measured ones in docs/memory.md.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from loramix import hardware
from loramix.defaults import CONTEXTS, KV_STORE_BYTES, MIX_PARTS, N_BATCH, N_CTX, NATIVE_ADAPTERS, RANK
from loramix.diagnose.wording import counted, size
from loramix.errors import NoSpace
from loramix.formats.gguf_reader import BLOCK, BLOCK_BYTES, ArrayInfo, GGUFFile, read_gguf
from loramix.formats.validate import BaseShape, read_base
from loramix.models.fuse import padded
from loramix.models.gate_file import Gate
from loramix.models.old_gate import NumpyGate
from loramix.pack.pack import Pack
from loramix.paths import data_dir, safe_join

KV_BYTES = 2
"""Bytes per number of the KV cache (float16)."""
NODE_BYTES = 436
"""Bytes per graph node that llama.cpp reserves: a tensor, its object and its table entries."""
PROCESS_BYTES = 46 * 2**20
"""Bytes of Python, NumPy, this package and llama.cpp's code."""
TOKEN_BYTES, MERGE_BYTES = 150, 220
"""Bytes per entry of llama.cpp's vocabulary tables."""
HEAP_BLOCK = 32 * 2**20
CELLS = 256
"""Granularity in tokens with which llama.cpp allocates the KV cache."""


@dataclass(frozen=True, slots=True)
class Part:
    """One consumer of memory or disk."""

    name: str
    size_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory and disk of one engine with full caches."""

    base: str
    n_skills: int
    n_ctx: int
    memory: tuple[Part, ...]
    disk: tuple[Part, ...]
    missing_bytes: int
    """Bytes on disk that are still to be written."""

    @property
    def memory_bytes(self) -> int:
        """Resident memory."""
        return sum(part.size_bytes for part in self.memory)

    @property
    def disk_bytes(self) -> int:
        """Files."""
        return sum(part.size_bytes for part in self.disk)


def make_plan(
    base: Path,
    *,
    n_ctx: int = N_CTX,
    pack: Pack | None = None,
    n_skills: int | None = None,
    rank: int = RANK,
    repack: bool = True,
) -> Plan:
    """Predict the memory and disk of an engine.

    Args:
        base: GGUF file of the base.
        n_ctx: context size in tokens.
        pack: pack with adapters and gate; by default adapters of `rank` on all linear layers, and no gate.
        n_skills: number of skills; by default the pack's. Further skills are counted like the largest one.
        rank: rank of adapters that are not in a pack.
        repack: whether llama.cpp may repack weights; see `loramix.runtime.probe`.

    Raises:
        NotFound, InvalidArtifact, Unsupported: see `loramix.formats.validate.read_base`.
    """
    file, shape = read_base(base)
    n_skills = (len(pack.skills) if pack else 0) if n_skills is None else n_skills
    n_ctx = min(n_ctx, shape.context_length)
    adapters = _adapters(shape, pack, n_skills, rank)
    held = sorted(adapters, key=lambda adapter: -adapter.native_bytes)[:NATIVE_ADAPTERS]
    gate = pack.gate() if pack else None
    # as in `loramix.models.fuse.Part`: A in 8 bits, B in float16
    kept = sorted((adapter.file_bytes * 3 // 4 for adapter in adapters), reverse=True)
    layers = gate.info.layers if isinstance(gate, NumpyGate) else []
    contexts = min(CONTEXTS, 1 + n_skills)
    compute = _compute_bytes(file, shape, n_ctx, layers)
    nodes = max(1024, 8 * len(file.tensors)) + 6 * sum(adapter.pairs for adapter in held)
    weights = sum(tensor.nbytes for tensor in file.tensors.values())
    repacked = _repacked_bytes(file) if repack else 0
    vocabulary = TOKEN_BYTES * shape.vocab_size + MERGE_BYTES * _length(file, "tokenizer.ggml.merges")
    gate_files = _gate_files(pack)
    mapped = weights - _unread_bytes(file, shape) - (repacked if sys.platform == "linux" else 0)
    memory = [
        Part("base", mapped, "the file, mapped"),
        Part("base, repacked", repacked, "copies for this CPU's kernels"),
        Part("vocabulary", vocabulary, f"{shape.vocab_size:,} tokens"),
        Part(
            "KV",
            contexts * kv_bytes(file, shape, n_ctx),
            f"{contexts} contexts of up to {n_ctx:,} tokens, float16",
        ),
        Part(
            "compute",
            contexts * (compute + 2 * NODE_BYTES * nodes),
            f"batches of {min(N_BATCH, n_ctx)}, graphs",
        ),
        Part(
            "adapters", sum(adapter.native_bytes for adapter in held), f"{len(held)} of {n_skills} at a time"
        ),
        Part("blends", sum(kept[:MIX_PARTS]), f"weights of up to {MIX_PARTS} skills, for new blends"),
        Part(
            "gate", sum(gate_files[:1]) + _reading_bytes(file, shape, gate, n_ctx, nodes), "and what it reads"
        ),
        Part("KV store", KV_STORE_BYTES, "at most; for repeated prompts"),
        Part("slack", _slack_bytes(compute, len(held)), "what the allocator keeps after swaps"),
        Part("process", PROCESS_BYTES, "Python, NumPy, llama.cpp"),
    ]
    disk = [
        Part("base", base.stat().st_size),
        Part("adapters", sum(adapter.file_bytes for adapter in adapters), counted(n_skills, "skill")),
        Part("gate", sum(gate_files)),
    ]
    missing = sum(adapter.file_bytes for adapter in adapters[len(pack.skills) if pack else 0 :])
    return Plan(base.name, n_skills, n_ctx, tuple(memory), tuple(disk), missing)


class Adapter(NamedTuple):
    """Sizes of one adapter."""

    native_bytes: int
    """Bytes in llama.cpp's memory."""
    file_bytes: int
    pairs: int
    """Number of adapted matrices."""


def _adapters(shape: BaseShape, pack: Pack | None, n_skills: int, rank: int) -> list[Adapter]:
    known = [_packed(shape, pack, skill.name) for skill in pack.skills[:n_skills]] if pack else []
    if len(known) == n_skills:
        return known
    if known:
        more = max(known)
    else:
        linear = [extents for name, extents in shape.tensors.items() if name.startswith("blk.")]
        width = sum(map(sum, linear))  # a row of A and a column of B at rank 1
        more = Adapter(_native(shape, width * rank, rank), 2 * width * rank, len(linear))
    return known + [more] * (n_skills - len(known))


def _packed(shape: BaseShape, pack: Pack, skill: str) -> Adapter:
    content = pack.adapter_bytes(skill)
    pairs = [
        (tensor.nbytes, tensor.shape[0])
        for name, tensor in read_gguf(content, skill).tensors.items()
        if name.endswith(".lora_a")
    ]
    rank = max((rank for _, rank in pairs), default=1)
    return Adapter(_native(shape, len(content) // 2, rank), len(content), len(pairs))


def _native(shape: BaseShape, n_numbers: int, rank: int) -> int:
    """Return the bytes of a loaded adapter's numbers; see `loramix.models.fuse`."""
    if not shape.is_quantized:
        return 2 * n_numbers
    return n_numbers * padded(rank) // rank * BLOCK_BYTES // BLOCK


def kv_bytes(file: GGUFFile, shape: BaseShape, n_ctx: int) -> int:
    """Return the bytes of a context's full KV cache; llama.cpp zeroes it, so all of it is resident."""
    head = shape.n_embd // shape.n_head
    lengths = (_number(file, f"attention.{what}_length", head) for what in ("key", "value"))
    return KV_BYTES * shape.n_layer * padded(n_ctx, CELLS) * shape.n_head_kv * sum(lengths)


def _compute_bytes(file: GGUFFile, shape: BaseShape, n_ctx: int, layers: Sequence[int]) -> int:
    """Return the bytes of a context's compute buffer: activations, widest in the feed-forward part, and the mask.

    Hidden states that the gate reads are kept to the end of the pass; the last layer's input always is.
    """
    batch, n_ff = min(N_BATCH, n_ctx), _number(file, "feed_forward_length", 4 * shape.n_embd)
    kept = sum(layer < shape.n_layer - 1 for layer in layers)
    rows = 3 * n_ff + (4 + kept) * shape.n_embd
    quantized = n_ff + n_ff // 16  # the matmul's other side, 8 bits and its scales
    return batch * (4 * rows + quantized) + 2 * batch * padded(n_ctx, CELLS) + 4 * shape.vocab_size


def _reading_bytes(file: GGUFFile, shape: BaseShape, gate: Gate | None, n_ctx: int, nodes: int) -> int:
    """Return the bytes of what a gate reads: its own small context; states in answers' contexts for an old gate."""
    if gate is None:
        return 0
    if isinstance(gate, NumpyGate):
        return 4 * shape.n_embd * len(gate.info.layers) * min(n_ctx, N_BATCH)
    tokens = gate.info.first + gate.info.last
    return kv_bytes(file, shape, tokens) + _compute_bytes(file, shape, tokens, []) + 2 * NODE_BYTES * nodes


def _repacked_bytes(file: GGUFFile) -> int:
    """Return the bytes of the weights that llama.cpp repacks; the embedding is not repacked."""
    kinds = hardware.repacked_types()
    return sum(
        tensor.nbytes
        for name, tensor in file.tensors.items()
        if tensor.type_name in kinds and name != "token_embd.weight" and tensor.shape[0] % 8 == 0
    )


def _unread_bytes(file: GGUFFile, shape: BaseShape) -> int:
    """Return the bytes of the token embedding that are not read: two thirds, if it is not also the output head.

    Only rows of tokens that occur are read. Texts of 10,000 tokens touch 31 to 38 % of Qwen2.5's embedding, in units
    of 64 KiB that Linux maps at a time.
    """
    return 0 if shape.tied else file.tensors["token_embd.weight"].nbytes * 2 // 3


def _gate_files(pack: Pack | None) -> list[int]:
    """Return the sizes of the gate and of its features; the features stay on disk."""
    if pack is None or pack.gate_path is None or pack.manifest.gate is None:
        return []
    features = pack.manifest.gate.features
    paths = [pack.gate_path, *([safe_join(pack.directory, features)] if features else [])]
    return [path.stat().st_size for path in paths]


def _slack_bytes(compute: int, n_adapters: int) -> int:
    """Return the bytes lost to heap fragmentation: each adapter makes llama.cpp allocate a new compute buffer.

    glibc returns blocks of 32 MB and more (M_MMAP_THRESHOLD_MAX); the measured loss is half a buffer per adapter.
    """
    return n_adapters * compute // 2 if compute < HEAP_BLOCK else 0


def _number(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(f"{file.metadata['general.architecture']}.{key}", default)
    return value if isinstance(value, int) else default


def _length(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key)
    return value.length if isinstance(value, ArrayInfo) else 0


def check_fits(plan: Plan) -> str:
    """Check that a plan fits this machine and its cgroup's limit.

    Args:
        plan: predicted memory and disk.

    Returns:
        A note if the plan fits, but not together with the programs that run now; otherwise an empty text.

    Raises:
        NoSpace: there is too little memory, or too little disk for the missing files.
    """
    total, available = hardware.memory_bytes()
    what = f"{plan.base} with {counted(plan.n_skills, 'skill')} and {plan.n_ctx:,} tokens"
    if total and plan.memory_bytes > total:
        raise NoSpace(
            f"{what} needs {size(plan.memory_bytes)} of memory, this machine or its container has {size(total)}: "
            "use a smaller --ctx, a smaller base, or a quantization with fewer bits."
        )
    directory = data_dir()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if plan.missing_bytes > free:
        raise NoSpace(
            f"{what} needs {size(plan.missing_bytes)} more on disk, {directory} has {size(free)} free: make room, or "
            "set LORAMIX_DATA to another disk."
        )
    if total and plan.memory_bytes > available:
        return f"only {size(available)} of {size(total)} of memory are free now; close other programs first"
    return ""
