"""Runs llama.cpp work of training in child processes, because PyTorch and llama.cpp must not share a process.

Each brings its own OpenMP runtime. Imports no native code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.errors import REFUSED, InvalidArtifact, InvalidData, NativeError, SelfCheckFailed
from loramix.paths import sha256_file
from loramix.runtime.state_parts import Turns
from loramix.templates.base_template import check_template


def token_states(
    base: Path, requests: Sequence[Turns], layers: Sequence[int], directory: Path
) -> Iterator[int]:
    """Compute states of all tokens of many conversations; see `loramix.runtime.token_states`.

    Args:
        base: the GGUF base.
        requests: the messages of each conversation, in tagged pieces, as the gate reads them.
        layers: layers whose inputs are kept.
        directory: where the parts are written; parts that are there must be of these requests.

    Yields:
        How many conversations are done, after each part.

    Raises:
        InvalidArtifact: the base has no chat template that can be used.
        NativeError: the child failed.
    """
    check_template(base)
    directory.mkdir(parents=True, exist_ok=True)
    names = ",".join(map(str, layers))
    command = [sys.executable, "-m", "loramix.runtime.token_states", str(base), str(directory), names]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError), child.stdin:  # a child that failed says why on stderr
                child.stdin.writelines(json.dumps({"turns": turns}) + "\n" for turns in requests)
            for line in child.stdout:
                yield int(line)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        if code:
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            raise NativeError(f"reading prompts with {base} failed: {reason}; run 'loramix doctor'.")


def tokenize_rows(
    base: Path, rows: Sequence[dict[str, str]]
) -> tuple[list[tuple[npt.NDArray[np.int32], int]], int]:
    """Tokenize prompts with answers; see `loramix.runtime.tokenize`.

    Args:
        base: the GGUF with the vocabulary and chat template.
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
    """Measure how much an adapter changes the base's logits; see `loramix.convert.selfcheck.applied`.

    Args:
        base: GGUF base.
        adapter: validated GGUF LoRA.

    Returns:
        Largest absolute difference of a logit.

    Raises:
        SelfCheckFailed: the adapter changes nothing.
        NativeError: the child failed.
    """
    child = _run("loramix.convert.selfcheck", str(base), str(adapter))
    if child.returncode == REFUSED:
        raise SelfCheckFailed(_reason(child))
    if child.returncode:
        raise NativeError(f"{adapter} cannot be tried on {base}: {_reason(child)}; run 'loramix doctor'.")
    return float(child.stdout)


def label_temperature(
    base: Path, adapter: Path, labels: Sequence[str], rows: Sequence[tuple[str, str]]
) -> float:
    """Fit the calibration temperature of a label skill; see `loramix.runtime.label_calibration`.

    Args:
        base: GGUF base.
        adapter: validated GGUF LoRA.
        labels: all labels.
        rows: pairs of a prompt and its right label.

    Raises:
        InvalidData: a prompt cannot be used.
        NativeError: the child failed.
    """
    pairs = [{"prompt": prompt, "label": label} for prompt, label in rows]
    job = json.dumps({"labels": list(labels), "rows": pairs, "sha256": sha256_file(adapter)})
    child = _run("loramix.runtime.label_calibration", str(base), str(adapter), lines=job)
    if child.returncode == REFUSED:
        raise InvalidData(_reason(child))
    if child.returncode:
        raise NativeError(f"calibrating {adapter} on {base} failed: {_reason(child)}; run 'loramix doctor'.")
    return float(json.loads(child.stdout)["temperature"])


def _run(module: str, *arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, input=lines, text=True, capture_output=True, check=False)


def _reason(child: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a child's stderr."""
    return (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
