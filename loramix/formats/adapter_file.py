"""Reads a GGUF LoRA file with a size limit, and identifies other files for the error message."""

from __future__ import annotations

import stat
import struct
from pathlib import Path

from loramix.errors import InvalidArtifact, NotFound
from loramix.formats.gguf_reader import FLOAT32
from loramix.formats.sniff import HEAD, sniff

MAX_ADAPTER_BYTES = 512 * 2**20
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy"}


def read_adapter_bytes(path: Path) -> bytes:
    """Read an adapter file.

    Raises:
        NotFound: the file does not exist.
        InvalidArtifact: not a regular file, too large, or a pickle.
    """
    try:
        status = path.stat()
    except OSError:
        raise NotFound(f"no adapter at {path}; make one with 'loramix convert adapter'.") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArtifact(f"{path} is not a regular file; give a GGUF LoRA file.")
    if status.st_size > MAX_ADAPTER_BYTES:
        raise InvalidArtifact(
            f"{path} has {status.st_size} bytes, an adapter has at most {MAX_ADAPTER_BYTES}; give a GGUF LoRA file."
        )
    with path.open("rb") as file:
        content = file.read(MAX_ADAPTER_BYTES + 1)
    if content[:4] != b"GGUF" and (wrong := sniff(content[:HEAD], len(content))):
        raise InvalidArtifact(f"adapter {path} is rejected: {wrong}.")
    if path.suffix in _PICKLES:
        raise InvalidArtifact(
            f"{path} may be a pickle, which can run code: save it as safetensors and convert that."
        )
    return content


def with_scale(content: bytes, scale: float) -> bytes:
    """Return a GGUF LoRA file whose update has another strength: its alpha is multiplied.

    Args:
        content: a file that passed `check_adapter`.
        scale: factor of the update.

    Raises:
        InvalidArtifact: the file has no alpha.
    """
    name = b"adapter.lora.alpha"
    key = struct.pack("<Q", len(name)) + name + struct.pack("<I", FLOAT32)
    start = content.find(key)
    place = start + len(key)
    if start < 0 or len(content) < place + 4:
        raise InvalidArtifact("the adapter has no alpha to scale; convert it with 'loramix convert adapter'.")
    (alpha,) = struct.unpack_from("<f", content, place)
    return content[:place] + struct.pack("<f", alpha * scale) + content[place + 4 :]


def embedding_adapted(target: str, tied: bool) -> str:
    """Explain that an adapter on the token embedding or the output head cannot run, for an error message.

    Args:
        target: ``token_embd.weight`` or ``output.weight``.
        tied: whether the base's output head is its token embedding.
    """
    embedding = target == "token_embd.weight"
    what = "embed_tokens, the token embedding" if embedding else "lm_head, the output head"
    also = f", which is also this base's {'output head' if embedding else 'token embedding'}" if tied else ""
    name = "embed_tokens" if embedding else "lm_head"
    return f"{what}{also}: llama.cpp cannot run a LoRA on it safely; train again without {name} in target_modules."
