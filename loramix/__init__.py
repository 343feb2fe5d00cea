"""Loramix: many LoRA skills on one small quantized base, mixed by a learned gate, on a laptop CPU.

The public names load on first use, so that ``import loramix`` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loramix.defaults import DEFAULT_PACK as DEFAULT
from loramix.defaults import __version__

__all__ = ["DEFAULT", "Answer", "Engine", "LoramixError", "Mix", "Pack", "Route", "__version__"]

if TYPE_CHECKING:
    from loramix.errors import LoramixError
    from loramix.models.mixing import Mix
    from loramix.pack.pack import Pack
    from loramix.runtime.answer import Answer
    from loramix.runtime.engine import Engine
    from loramix.runtime.router import Route

_HOMES = {
    "Answer": "loramix.runtime.answer",
    "Engine": "loramix.runtime.engine",
    "LoramixError": "loramix.errors",
    "Mix": "loramix.models.mixing",
    "Pack": "loramix.pack",
    "Route": "loramix.runtime.router",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loramix' has no attribute {name!r}")
