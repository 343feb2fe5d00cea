"""Crash-safe checkpoints: written to a temporary directory, completed with digests, then renamed.

A checkpoint is a directory ``step-00000100`` with tensors (safetensors), ``state.json`` and, written
last, ``COMPLETE``: the SHA-256 of each file. A checkpoint without it, or with a wrong digest, is ignored.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from loramix.paths import sha256_file, sync_directory, write_bytes, write_text

_SEAL = "COMPLETE"


@dataclass(frozen=True)
class Checkpoint:
    """A complete training state: ``tensors`` by group and name, and JSON-able ``state``."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict[str, Any]
) -> Path:
    """Write a checkpoint and delete all but the last two.

    Args:
        directory: directory of the run's checkpoints.
        step: number of optimizer steps done.
        tensors: groups of tensors, one safetensors file each.
        state: further state needed to resume, as JSON.

    Returns:
        The checkpoint's directory.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for group, named in tensors.items():
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        write_bytes(partial / f"{group}.safetensors", save_tensors(whole))
    write_text(partial / "state.json", json.dumps({"step": step, **state}))
    digests = {file.name: sha256_file(file) for file in sorted(partial.iterdir())}
    write_text(partial / _SEAL, json.dumps(digests))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_directory(directory)
    for old in _steps(directory)[:-2]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(directory: Path) -> Checkpoint | None:
    """Load the newest complete checkpoint; damaged ones are skipped with a warning on stderr."""
    for path in reversed(_steps(directory)):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError) as error:
            print(
                f"warning: checkpoint {path} is damaged ({error}); the previous one is used.", file=sys.stderr
            )
    return None


def _steps(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def _read(path: Path) -> Checkpoint:
    digests = json.loads((path / _SEAL).read_text())
    if not isinstance(digests, dict) or "state.json" not in digests:
        raise ValueError("COMPLETE is invalid")
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, digest in digests.items():
        if sha256_file(path / name) != digest:
            raise ValueError(f"{name} has changed")
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = load_tensors((path / name).read_bytes())
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(int(state["step"]), tensors, state)
