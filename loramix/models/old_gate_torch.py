"""The gate of format 1 in torch, for `loramix convert gate`; `old_gate` has the same forward pass for serving.

Independent of prompts, losses and packs. Saved as gate.safetensors and gate.json, without pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch.nn import functional as F

from loramix.errors import InvalidArtifact, NotFound
from loramix.models.head_info import MAX_GATE_BYTES
from loramix.models.old_gate import Floats, GateInfo, check_arrays
from loramix.paths import write_bytes


class Gate(torch.nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """An ensemble of small MLPs over standardized features, weights of the members stacked.

    Args:
        info: skills (K), hidden widths, members (M) and gate_temperature; may be replaced after calibration.
        mean: (D,) float32, mean of the training features.
        std: (D,) float32, their standard deviation, positive.
        seed: of the initial weights; every member starts differently.
    """

    mean: torch.Tensor
    std: torch.Tensor
    gate_temperature: torch.Tensor

    def __init__(self, info: GateInfo, mean: torch.Tensor, std: torch.Tensor, *, seed: int = 0) -> None:
        super().__init__()
        self.info = info
        self.register_buffer("mean", mean.detach().clone().float())
        self.register_buffer("std", std.detach().clone().float())
        self.register_buffer("gate_temperature", torch.tensor(info.gate_temperature, dtype=torch.float32))
        generator = torch.Generator().manual_seed(seed)
        fan_in = 0
        for key, shape in info.shapes(len(mean)).items():
            if key in ("mean", "std"):
                continue
            if key.startswith("w"):
                fan_in = shape[1]  # its bias follows and starts in the same range, as in torch.nn.Linear
            start = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
            self.register_parameter(key, torch.nn.Parameter(start))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits before gate_temperature.

        Args:
            features: (B, D) float32.

        Returns:
            (B, M, classes) float32: the K skills, then the base's.
        """
        h = (features - self.mean) / self.std
        for i in range(len(self.info.hidden) + 1):
            if i:
                h = F.gelu(h, approximate="tanh")
            h = h @ self.get_parameter(f"w{i}") + self.get_parameter(f"b{i}")[:, None, :]  # (M, B, columns)
        return h.transpose(0, 1)

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities, averaged over the members.

        Args:
            features: (B, D) float32.

        Returns:
            (B, K+1) float32, each row summing to 1.
        """
        classes = torch.softmax(self.forward(features) / self.gate_temperature, dim=-1).mean(dim=1)
        k = len(self.info.skills)
        return torch.cat([classes[:, :k], classes[:, k:].sum(1, keepdim=True)], 1)

    def calibrate(self, *, gate_temperature: float, threshold: float, metrics: dict[str, float]) -> None:
        """Set what is measured after training, in the buffer and in ``info`` alike.

        Args:
            gate_temperature: divides the logits; positive.
            threshold: least probability of a skill, in [0, 1].
            metrics: what training measured; finite.
        """
        self.gate_temperature.fill_(gate_temperature)
        self.info = msgspec.structs.replace(
            self.info, gate_temperature=float(self.gate_temperature), threshold=threshold, metrics=metrics
        )

    def arrays(self) -> dict[str, Floats]:
        """Copies of all arrays by name, float32, as `NumpyGate` takes them."""
        return {
            key: np.array(tensor.detach().cpu().numpy(), dtype=np.float32)
            for key, tensor in self.state_dict().items()
            if key != "gate_temperature"
        }

    def save(self, directory: Path) -> None:
        """Write gate.safetensors and gate.json into ``directory``.

        Raises:
            InvalidArtifact: weights or metadata that `load` would refuse, such as NaN.
        """
        info = msgspec.structs.replace(self.info, gate_temperature=float(self.gate_temperature))
        arrays, document = self.arrays(), info.to_json()
        check_arrays(info, arrays, "the gate")
        # gate.json is deleted first and written last: an interrupted save is a missing gate, never a mixed one
        (directory / "gate.json").unlink(missing_ok=True)
        write_bytes(directory / "gate.safetensors", safetensors.numpy.save(arrays))
        write_bytes(directory / "gate.json", document)

    @classmethod
    def load(cls, directory: Path) -> Gate:
        """Read a gate that `save` wrote.

        Raises:
            NotFound: gate.safetensors or gate.json is not there.
            InvalidArtifact: a file that `save` did not write.
        """
        contents = []
        for path in (directory / "gate.json", directory / "gate.safetensors"):
            if not path.is_file():
                raise NotFound(
                    f"no trained gate of format 1 at {path}; 'loramix train gate PACK' writes a gate that needs no "
                    "conversion into the pack."
                )
            with path.open("rb") as file:
                contents.append(file.read(MAX_GATE_BYTES + 1))
            if len(contents[-1]) > MAX_GATE_BYTES:
                raise InvalidArtifact(
                    f"{path} is larger than the {MAX_GATE_BYTES // 2**20} MB a gate may have."
                )
        name = str(directory / "gate.safetensors")
        info = GateInfo.from_json(contents[0], str(directory / "gate.json"))
        try:
            arrays = safetensors.numpy.load(contents[1])
        except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
            raise InvalidArtifact(
                f"{name} is not a safetensors file ({error}); train the gate again."
            ) from None
        check_arrays(info, arrays, name)
        return cls.from_arrays(info, arrays)

    @classmethod
    def from_arrays(cls, info: GateInfo, arrays: Mapping[str, Floats]) -> Gate:
        """A gate of checked arrays, as `arrays` gives them and `NumpyGate` holds them."""
        gate = cls(info, torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["std"]))
        gate.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()}, strict=False)
        return gate
