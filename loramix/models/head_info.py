"""The description in a gate's file: skills, layers, sizes and calibration; untrusted.

The checks at the end are those of both formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from loramix.defaults import MAX_SKILLS
from loramix.errors import InvalidArtifact
from loramix.models.gate_window import FIRST_TOKENS, LAST_TOKENS
from loramix.models.mixing import RESERVED_NAMES
from loramix.paths import is_safe_name

MAX_GATE_BYTES = 32 * 2**20
BUCKETS = 48
"""Buckets of distances in a position embedding."""

Layer = Annotated[int, Meta(ge=0, le=1024)]
Name = Annotated[str, Meta(max_length=80)]
Info = TypeVar("Info", bound=msgspec.Struct)


class HeadInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a gate decides between, what it reads, and how it was calibrated."""

    skills: Annotated[list[str], Meta(max_length=MAX_SKILLS)]
    """Names of the K skills, in the order of the classes; those after them are the base."""
    layers: Annotated[list[Layer], Meta(min_length=1, max_length=8)]
    """Layers of the base whose inputs it reads, side by side in this order; 0 is the token embeddings."""
    width: Annotated[int, Meta(ge=1, le=65536)]
    """Width of the base's states, D."""
    d: Annotated[int, Meta(ge=1, le=1024)]
    """Width of the head."""
    depth: Annotated[int, Meta(ge=1, le=12)]
    """Transformer layers of the head."""
    heads: Annotated[int, Meta(ge=1, le=64)] = 4
    first: Annotated[int, Meta(ge=1, le=1024)] = FIRST_TOKENS
    last: Annotated[int, Meta(ge=1, le=1024)] = LAST_TOKENS
    """Tokens that are read: so many from the start and so many from the end."""
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Divides the logits, so that probabilities are calibrated."""
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Least probability that the skills need together; below it the base answers."""
    tags: Annotated[list[Name], Meta(max_length=2 * MAX_SKILLS)] = []
    """Names of the token tags; empty: it has none."""
    base_sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """SHA-256 of the base GGUF whose states it was trained on."""
    metrics: dict[str, float] = {}
    """What training measured, for people to read."""
    base_classes: Annotated[int, Meta(ge=1, le=257)] = 1
    """Classes whose probabilities are the base's together: its own, and one for each removed skill."""
    format: Literal[2] = 2
    """Format of gate.npz; 1 is a gate that reads the last token after a whole pass."""

    @classmethod
    def from_json(cls, data: bytes, name: str) -> HeadInfo:
        """Read and check the JSON form.

        Args:
            data: UTF-8 JSON.
            name: the file, for messages.

        Raises:
            InvalidArtifact: not JSON, an unknown key, a wrong type or value.
        """
        info = decode_info(data, cls, name)
        check_names(info.skills, name)
        if len(set(info.layers)) != len(info.layers):
            raise refused(name, f"it reads a layer twice: {info.layers}")
        if info.d % info.heads:
            raise refused(name, f"its width {info.d} cannot be divided among {info.heads} heads")
        if sum(math.prod(shape) for shape in expected(info).values()) > MAX_GATE_BYTES // 4:
            raise refused(name, f"its sizes need more than the {MAX_GATE_BYTES // 2**20} MB a gate may have")
        return info

    def to_json(self) -> bytes:
        """JSON form; see `encode_info`."""
        return encode_info(self)


def expected(info: HeadInfo) -> dict[str, tuple[int, ...]]:
    """Shapes of a head's arrays by name; linear weights are (in, out)."""
    d, classes = info.d, len(info.skills) + info.base_classes
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (info.width * len(info.layers),),
        "std": (info.width * len(info.layers),),
        "project.weight": (info.width * len(info.layers), d),
        "project.bias": (d,),
        "start": (BUCKETS, d),
        "end": (BUCKETS, d),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "query.weight": (d, 4),
        "query.bias": (4,),
        "out.weight": (6 * d, classes),
        "out.bias": (classes,),
    }
    for i in range(info.depth):
        for name, (rows, columns) in {
            "qkv": (d, 3 * d),
            "o": (d, d),
            "f1": (d, 2 * d),
            "f2": (2 * d, d),
        }.items():
            shapes[f"{i}.{name}.weight"], shapes[f"{i}.{name}.bias"] = (rows, columns), (columns,)
        for name in ("norm1", "norm2"):
            shapes[f"{i}.{name}.weight"] = shapes[f"{i}.{name}.bias"] = (d,)
    if info.tags:
        shapes["tag.weight"], shapes["tag.bias"] = (d, len(info.tags)), (len(info.tags),)
    return shapes


def refused(name: str, why: str) -> InvalidArtifact:
    """The error for a gate file that cannot be used."""
    return InvalidArtifact(f"{name} is refused: {why}; train it again with 'loramix train gate'.")


def decode_info(data: bytes, kind: type[Info], name: str) -> Info:
    """Read a gate's description.

    Args:
        data: UTF-8 JSON.
        kind: the struct of its format.
        name: the file, for messages.

    Raises:
        InvalidArtifact: not JSON, an unknown key, a wrong type or value.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refused(name, f"its info is not usable: {error}") from None


class _Info(Protocol):
    """A description of a gate, of either format."""

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Any:
        """Read and check the JSON form."""


def encode_info(info: _Info) -> bytes:
    """JSON form of a gate's description: UTF-8, indented, ending with a newline.

    Raises:
        InvalidArtifact: a value that `from_json` would refuse, such as a metric that is NaN.
    """
    data = msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n"
    info.from_json(data, "the gate")
    return data


def check_names(skills: Sequence[str], name: str) -> None:
    """Check that a gate's skills are distinct plain names.

    Raises:
        InvalidArtifact: they are not.
    """
    bad = [skill for skill in skills if not is_safe_name(skill) or skill in RESERVED_NAMES]
    if bad or len(set(skills)) != len(skills):
        raise refused(name, f"its skills must be distinct plain names, not {(bad or skills)[:3]!r}")


def check_shapes(
    arrays: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]], name: str
) -> None:
    """Check that a gate's arrays are finite float32 of exactly these names and shapes, and ``std`` positive.

    Args:
        arrays: by name.
        shapes: by name; ``std`` is one of them.
        name: the file, for messages.

    Raises:
        InvalidArtifact: they are not.
    """
    if wrong := sorted(arrays.keys() ^ shapes.keys()):
        raise refused(name, f"arrays are missing or unknown: {', '.join(map(repr, wrong[:5]))}")
    for key, shape in shapes.items():
        array = arrays[key]
        if array.shape != shape or array.dtype != np.float32:
            raise refused(name, f"{key!r} is {array.dtype} {array.shape}, its info needs float32 {shape}")
        if not np.isfinite(array).all():
            raise refused(name, f"{key!r} holds NaN or infinity")
    if not (arrays["std"] > 0).all():
        raise refused(name, "'std' holds values that are not positive")
