"""Reads a pack's gate.npz of either format: an `EarlyHead`, or the old gate that reads the last token."""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import msgspec

from loramix.errors import InvalidArtifact
from loramix.formats.npz import read_described
from loramix.formats.validate import BaseShape
from loramix.models.early_head import EarlyHead
from loramix.models.head_info import MAX_GATE_BYTES, HeadInfo, refused
from loramix.models.old_gate import GateInfo, NumpyGate

Gate: TypeAlias = EarlyHead | NumpyGate
OLD_FORMAT = (
    "the gate of {pack} is of an old kind that the next version cannot read; run 'loramix train gate {pack}'"
)


class _Format(msgspec.Struct):
    format: int = 1


def read_gate(data: bytes, name: str) -> Gate:
    """Read and check the content of a gate.npz.

    Args:
        data: content of the file.
        name: the file, for messages.

    Raises:
        InvalidArtifact: not a gate of either format.
    """
    info, arrays = read_described(data, MAX_GATE_BYTES, partial(refused, name))
    try:
        number = msgspec.json.decode(info, type=_Format).format
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        number = 2  # the reader of the newer format names what is wrong
    if number == 1:
        return NumpyGate(GateInfo.from_json(info, name), arrays, name)
    return EarlyHead(HeadInfo.from_json(info, name), arrays, name)


def check_fits(gate: Gate, shape: BaseShape, pack: str) -> None:
    """Check that a gate reads what the base has.

    Args:
        gate: of the pack.
        shape: of the base.
        pack: name of the pack, for messages.

    Raises:
        InvalidArtifact: layers that the base does not have, or states of another width.
    """
    if isinstance(gate, NumpyGate):
        found, needed = (
            gate.n_features,
            len(gate.info.layers) * len(gate.info.pooling.split("+")) * shape.n_embd,
        )
    else:
        found, needed = gate.info.width, shape.n_embd
    if max(gate.info.layers) >= shape.n_layer or found != needed:
        raise InvalidArtifact(
            f"the gate of {pack} reads layers {gate.info.layers} in {found} numbers; the "
            f"base has {shape.n_layer} layers of {shape.n_embd}: run 'loramix train gate {pack}'."
        )
