"""Removes the names of training frameworks' wrappers from tensor names.

``torch.compile``, DDP, DeepSpeed, FSDP, activation checkpointing, Lightning, TRL and PEFT wrap modules, and saved
tensor names contain the wrapper's name. Multimodal models, such as larger Gemma 3 models, have their language
model as a submodule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loramix.errors import InvalidArtifact

# attributes in which wrappers store the wrapped module; no Llama module has such a name
_ANYWHERE = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FSDP
    "_fpw_module",  # older FSDP, FairScale
    "_checkpoint_wrapped_module",  # torch's activation checkpointing
    "_forward_module",  # Lightning
    "module",  # DDP, DataParallel, DeepSpeed
    "pretrained_model",  # TRL's value heads
)
_SEGMENT = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(_ANYWHERE)})\.")
_PEFT = "base_model.model."
# Lightning modules and trainers store the model as an attribute
_OUTER = re.compile(
    r"^(?:(?:model|net|policy|student|actor|llm)\.)+(?=base_model\.model\.|model\.|lm_head\.)"
)
_LANGUAGE_MODEL = re.compile(
    r"^(?:model\.)?language_model\.(?:(?:model\.)?(?P<inner>layers|embed_tokens|norm)|(?=lm_head\.))"
)


def unwrapped(name: str) -> str:
    """Remove the wrappers of training frameworks from a tensor's name.

    Args:
        name: e.g. ``_orig_mod.model.layers.0.mlp._checkpoint_wrapped_module.up_proj.weight``.

    Returns:
        e.g. ``model.layers.0.mlp.up_proj.weight``; a name without wrappers is unchanged.
    """
    name = _OUTER.sub("", _SEGMENT.sub("", name))
    while name.startswith(_PEFT):
        name = _OUTER.sub("", name.removeprefix(_PEFT))
    return _LANGUAGE_MODEL.sub(lambda match: f"model.{match['inner']}" if match["inner"] else "", name)


def unwrapped_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Map the tensor names of a file to names without wrappers.

    Args:
        names: names in the file.
        where: the file, for messages.

    Raises:
        InvalidArtifact: two tensors would have the same name.
    """
    found: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in names:
        plain = unwrapped(name)
        if plain in origin:
            raise InvalidArtifact(
                f"{where} has both {origin[plain][:100]!r} and {name[:100]!r}, the same tensor without wrappers; "
                "save the unwrapped model again."
            )
        origin[plain] = name
        found[name] = plain
    return found
