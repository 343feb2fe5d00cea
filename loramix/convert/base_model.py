"""The frozen base in PyTorch, with a digest of its weights to verify that training does not change them."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loramix.convert.gguf_model import load_gguf
from loramix.convert.hf.view import key_mapping, plain_directory
from loramix.errors import NotFound, Unsupported


def device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32; docs/base.md has the measurements."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of the libraries, which are addressed to developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_base(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a base for training, frozen.

    Args:
        path: a GGUF, whose dequantized values are used, or a Hugging Face directory.
        dtype: type of the matrices that autocast would round anyway; everything else stays float32.

    Returns:
        A transformers causal LM in eval mode, all parameters without gradient.

    Raises:
        NotFound: the file or directory does not exist.
        Unsupported: transformers cannot read the base.
    """
    import transformers

    if not path.exists():
        raise NotFound(f"no base at {path}; get one with 'loramix pull'.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    try:
        with quiet():
            model = load_gguf(path) if path.is_file() else _from_directory(path, options)
    except (OSError, ValueError, KeyError) as error:
        raise Unsupported(f"transformers cannot read the base {path}: {error}.") from None
    model.requires_grad_(False)
    model.eval()
    if dtype != torch.float32:
        # autocast does not round embedding lookups, so the embedding stays float32 even if it is also the head
        embedding = model.get_input_embeddings().weight
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
                module.to(dtype)  # autocast rounds these at each use: do it once
    return model.to(device())


def _from_directory(path: Path, options: dict[str, Any]) -> Any:
    """Load a checkpoint and reject missing weights, which transformers would fill with random numbers.

    Raises:
        Unsupported: weights are missing, or have names that the model does not know.
    """
    import transformers

    with plain_directory(path) as plain:
        if mapping := key_mapping(plain):
            options = {**options, "key_mapping": mapping}
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(plain), output_loading_info=True, **options
        )
    if lost := sorted(found["missing_keys"]):
        raise Unsupported(
            f"{path} lacks {lost[0]} and {len(lost) - 1} other weights of its model; download the whole checkpoint, "
            "or save the model without its wrappers."
        )
    return model


def digest(model: Any) -> str:
    """SHA-256 over the names and bytes of all base weights; LoRA parameters are left out."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" not in name:
            plain = name.replace("base_model.model.", "", 1).replace(".base_layer", "")
            sha.update(plain.encode())
            sha.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
