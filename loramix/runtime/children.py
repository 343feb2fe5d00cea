"""What needs llama.cpp, asked of a child process: training holds PyTorch, and the two must not share a process.

Both bring an OpenMP runtime of their own. Imports no native code.
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

from loramix.errors import InvalidArtifact, InvalidData, NativeError, SelfCheckFailed
from loramix.templates.base_template import check_template

REFUSED = 3
"""Exit code of a child whose input is the reason of its failure; its last line on stderr says why."""


def compute(
    base: Path, prompts: Sequence[str], layers: Sequence[int], *, share: bool = False
) -> dict[str, npt.NDArray[np.float16]]:
    """Features of many prompts for the gate; see `loramix.runtime.features`.

    Args:
        base: the GGUF that serves.
        prompts: user's texts, one message each.
        layers: layers to tap.
        share: read what prompts begin with once: nearly half of short ones, at the price of rounding, some 0.04
            standard deviations of a feature.

    Returns:
        float16 arrays (prompts, D) by ``last:LAYER`` and ``mean:LAYER``.

    Raises:
        InvalidArtifact: the base has no chat template that can be used.
        NativeError: the child failed.
    """
    check_template(base)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "features.npz"
        options = [",".join(map(str, layers)), *["--share"] * share]
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        child = _run("loramix.runtime.features", str(base), str(out), *options, lines=lines)
        if child.returncode or not out.is_file():
            raise NativeError(
                f"computing features with {base} failed: {_reason(child)}; run 'loramix doctor'."
            )
        with np.load(out, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}


def tokenize_rows(
    base: Path, rows: Sequence[dict[str, str]]
) -> tuple[list[tuple[npt.NDArray[np.int32], int]], int]:
    """Tokenize prompts with answers; see `loramix.runtime.tokenize`.

    Args:
        base: the GGUF whose vocabulary and chat template count.
        rows: ``{"prompt": …, "answer": …}``.

    Returns:
        For each row its ids (T,) int32 with the number of answer tokens at their end, the
        end-of-turn token included; and the id of that token.

    Raises:
        InvalidArtifact: the base has no chat template that can be used.
        InvalidData: a prompt cannot be used.
        NativeError: the child failed.
    """
    check_template(base)
    return tokenized(base, rows)


def tokenized(
    base: Path, rows: Sequence[dict[str, str]]
) -> tuple[list[tuple[npt.NDArray[np.int32], int]], int]:
    """`tokenize_rows` of a base that has been checked, or of a vocabulary without tensors."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "tokens.npz"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        child = _run("loramix.runtime.tokenize", str(base), str(out), lines=lines)
        if child.returncode == REFUSED:
            raise InvalidData(_reason(child))
        if child.returncode or not out.is_file():
            raise NativeError(f"tokenizing with {base} failed: {_reason(child)}; run 'loramix doctor'.")
        with np.load(out, allow_pickle=False) as archive:
            ids, lengths, eot = archive["ids"], archive["lengths"], int(archive["eot"])
    if lengths.shape != (len(rows), 2):
        raise InvalidArtifact(f"tokenizing with {base} gave {lengths.shape[0]} rows for {len(rows)}.")
    ends = np.cumsum(lengths.sum(axis=1))
    starts = ends - lengths.sum(axis=1)
    return [(ids[a:b], int(n)) for a, b, n in zip(starts, ends, lengths[:, 1], strict=True)], eot


def adapter_effect(base: Path, adapter: Path) -> float:
    """How much an adapter changes the base's logits; see `loramix.convert.selfcheck.applied`.

    Args:
        base: GGUF base.
        adapter: GGUF LoRA, already checked.

    Returns:
        Largest difference of a logit.

    Raises:
        SelfCheckFailed: it changes nothing.
        NativeError: the child failed.
    """
    child = _run("loramix.convert.selfcheck", str(base), str(adapter))
    if child.returncode == REFUSED:
        raise SelfCheckFailed(_reason(child))
    if child.returncode:
        raise NativeError(f"{adapter} cannot be tried on {base}: {_reason(child)}; run 'loramix doctor'.")
    return float(child.stdout)


def _run(module: str, *arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, input=lines, text=True, capture_output=True, check=False)


def _reason(child: subprocess.CompletedProcess[str]) -> str:
    """The last line of a child's complaint."""
    return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
