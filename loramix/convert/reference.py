"""``python -m loramix.convert.reference JOB.json OUT.npz``: PyTorch's results, to compare conversions with.

Runs in its own process, because torch and llama.cpp must not share one. A single adapter uses PEFT's forward pass;
several are merged into the weights with PEFT's deltas.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.errors import MissingExtra, SelfCheckFailed


def main(arguments: Sequence[str]) -> None:
    """Read ``{"base", "adapters": [[directory, scale], …], "ids": [[…], …]}``; write one ``logitsN`` for each ids."""
    import torch
    from peft import PeftModel

    from loramix.convert.base_model import load_base

    job = json.loads(Path(arguments[0]).read_text())
    model = load_base(Path(job["base"]))
    mix = [(directory, float(scale)) for directory, scale in job["adapters"]]
    if len(mix) == 1 and mix[0][1] == 1.0:
        model = PeftModel.from_pretrained(model, mix[0][0], config=_always(mix[0][0]))
    elif mix:
        model = _merged(model, mix)
    logits = {}
    with torch.no_grad():
        for number, ids in enumerate(job["ids"]):
            logits[f"logits{number}"] = model(torch.tensor([ids])).logits[0].float().numpy()
    np.savez(arguments[1], **logits)


def _always(directory: str) -> object:
    """Load an adapter's configuration, always active, because the comparison covers only the matrices."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(directory)
    config.alora_invocation_tokens = None
    return config


def _merged(model: object, mix: list[tuple[str, float]]) -> object:
    """Write ``W + sum of scale * delta W`` into the matrices of the base."""
    import torch
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(model, mix[0][0], adapter_name="a0", config=_always(mix[0][0]))
    for number, (directory, _) in enumerate(mix[1:], 1):
        tuned.load_adapter(directory, adapter_name=f"a{number}", peft_config=_always(directory))
    with torch.no_grad():
        for module in tuned.modules():
            for number, (_, scale) in enumerate(mix):
                if f"a{number}" in getattr(module, "lora_A", {}):
                    module.get_base_layer().weight += scale * module.get_delta_weight(f"a{number}")
    return tuned.unload()


def torch_logits(
    base: Path, adapters: Sequence[tuple[Path, float]], ids: Sequence[Sequence[int]]
) -> list[npt.NDArray[np.float32]]:
    """Compute float32 logits under a mix of PEFT adapters with PyTorch.

    Args:
        base: GGUF or Hugging Face directory.
        adapters: PEFT directories with scales; empty for the bare base.
        ids: token ids of each text.

    Returns:
        (T, V) float32 for each text.

    Raises:
        MissingExtra: torch, transformers or peft is not installed.
        SelfCheckFailed: PyTorch failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        job, out = Path(directory) / "job.json", Path(directory) / "out.npz"
        mix = [[str(path), scale] for path, scale in adapters]
        job.write_text(json.dumps({"base": str(base), "adapters": mix, "ids": [list(row) for row in ids]}))
        torch_child("loramix.convert.reference", job, out)
        with np.load(out, allow_pickle=False) as archive:
            return [archive[f"logits{number}"] for number in range(len(ids))]


def torch_child(module: str, job: Path, out: Path) -> None:
    """Run ``python -m MODULE JOB OUT``, which imports torch, and wait for it.

    Raises:
        MissingExtra: torch, transformers or peft is not installed.
        SelfCheckFailed: the process failed, or wrote nothing.
    """
    child = _run([sys.executable, "-m", module, str(job), str(out)])
    if "No module named" in child.stderr:
        raise MissingExtra("comparing with PyTorch needs the extra: pip install 'loramix[train]'.")
    if child.returncode or not out.is_file():
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise SelfCheckFailed(f"the comparison in PyTorch failed: {reason}.")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    main(sys.argv[1:])
