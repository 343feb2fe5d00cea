"""What training keeps in memory: nothing below the lowest adapter, and as much as was estimated above it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import N_LAYER, write_base

pytest.importorskip("torch")
import torch
from torch.autograd.graph import saved_tensors_hooks

from loramix.models.architectures import ARCHITECTURES
from loramix.train.data import Example
from loramix.train.forward import collate, hidden_states
from loramix.train.frozen import attach, load_base
from loramix.train.late import late_states
from loramix.train.memory import BatchShape, checkpoint_layers, is_short, kept_bytes, step_bytes
from loramix.train.recipe import Lora

pytestmark = pytest.mark.train
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LOWEST = 1
HEADER = 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    head = {"qwen3": 24, "gemma3": 32}.get(request.param, 16)
    path = tmp_path_factory.mktemp("bases") / f"{request.param}.gguf"
    return write_base(path, architecture=request.param, head=head)


def adapted(base: Path, **options: Any) -> Any:
    """A PEFT model with random matrices on the layers from `LOWEST` on."""
    torch.manual_seed(0)
    shape = Lora(r=2, lora_alpha=4, skip_lowest=(LOWEST + 0.1) / N_LAYER, **options)
    model = attach(load_base(base), shape)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def examples(rows: int = 4, length: int = 40, prefix: int = 12, answer: int = 6) -> list[Example]:
    """Rows of random tokens with one beginning and one header, the last row three tokens shorter."""
    rng = np.random.default_rng(rows)
    ids = rng.integers(3, 250, (rows, length)).astype(np.int32)
    ids[:, :prefix] = ids[0, :prefix]
    found = [Example(row, answer) for row in ids]
    found[-1] = Example(ids[-1, 3:] if prefix == 0 else np.delete(ids[-1], [20, 21, 22]), answer)
    return found


def plain(model: Any) -> torch.Tensor:
    ids, mask, _ = collate(examples())
    return hidden_states(model.get_base_model().model, ids, mask, 0)


def shared(model: Any) -> torch.Tensor:
    ids, mask, _ = collate(examples())
    return hidden_states(model.get_base_model().model, ids, mask, 12)


def checkpointed(model: Any) -> torch.Tensor:
    checkpoint_layers(model)
    return plain(model)


def late(model: Any) -> torch.Tensor:
    return late_states(model, examples(), HEADER, 12)[0]


WAYS = pytest.mark.parametrize("way", [plain, shared, checkpointed, late], ids=lambda way: way.__name__)


@WAYS
def test_nothing_is_kept_below_the_lowest_adapter(way: Callable[[Any], torch.Tensor], base: Path) -> None:
    model = adapted(base, target_modules=ALL)
    layers = model.get_base_model().model.layers
    place, kept, outputs = [-1], Counter[int](), []

    def enter(number: int) -> Any:
        return lambda *_: place.__setitem__(0, number)

    def leave(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append((place[0], output))
        place[0] = N_LAYER

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(number))
        layer.register_forward_hook(leave)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[place[0]] += 1
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = way(model)
    below = [output for number, output in outputs if number < LOWEST]
    assert below and all(output.grad_fn is None and not output.requires_grad for output in below)
    assert not any(kept[number] for number in range(-1, LOWEST))
    if way is not checkpointed:  # what it keeps is outside of these hooks: each layer's input
        assert all(kept[number] for number in range(LOWEST, N_LAYER))
    hidden.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@WAYS
def test_gradients_are_those_of_lower_layers_without_a_graph(
    way: Callable[[Any], torch.Tensor], base: Path
) -> None:
    found = []
    for explicit in (False, True):
        model = adapted(base)
        if explicit:
            for layer in model.get_base_model().model.layers[:LOWEST]:
                layer.forward = torch.no_grad()(layer.forward)
        loss = way(model).square().mean()
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters() if p.requires_grad]))
    (loss, grads), (other_loss, other_grads) = found
    assert torch.equal(loss, other_loss) and len(grads) == 2 * len(ATTENTION) * (N_LAYER - LOWEST)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, other_grads, strict=True))


def measured(model: Any, part: list[Example], prefix: int, dtype: torch.dtype) -> int:
    """Bytes of all that the forward pass and the loss keep, weights and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, mask, answer = collate(part)
    inner = model.get_base_model()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = hidden_states(inner.model, ids, mask, prefix)
            logits = inner.lm_head(hidden[:, :-1][answer[:, prefix:]])
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][answer], reduction="sum")
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ALL}, {"target_modules": ALL, "lora_dropout": 0.1}], ids=str
)
@pytest.mark.parametrize(
    "rows, length, prefix, answer",
    [(16, 40, 0, 4), (16, 90, 30, 20), (1, 400, 0, 30), (3, 200, 20, 90)],
)
def test_the_estimate_is_what_is_kept(
    rows: int, length: int, prefix: int, answer: int, options: dict[str, Any], dtype: torch.dtype, base: Path
) -> None:
    model = adapted(base, **options)
    part = examples(rows, length, prefix, answer)
    found = measured(model, part, prefix, dtype)
    assert kept_bytes(model, BatchShape.of(part, prefix), dtype) == pytest.approx(found, rel=0.15)


def test_memory_is_short_for_the_largest_batch_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base)
    small, large = BatchShape(4, 40, 8), BatchShape(4, 40, 80)
    assert (
        step_bytes(model, large) - step_bytes(model, small) == 3 * 4 * 259 * 72
    )  # log-probabilities, twice again
    free = step_bytes(model, small) / 0.8 + 1
    monkeypatch.setattr("loramix.train.memory.memory_bytes", lambda: (10**12, free))
    assert not is_short(model, [small, small])
    assert is_short(model, [small, large])
    monkeypatch.setattr("loramix.train.memory.memory_bytes", lambda: (0, 0))
    assert not is_short(model, [large])  # unknown
