"""A tiny pack whose gate tags words by their letters: ``MMM OO SSS: a text`` asks for a summary and the sentiment."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tiny import N_EMBD

from loramix.models import bases
from loramix.models.early_head import EarlyHead, HeadInfo
from loramix.models.head_info import expected
from loramix.pack.edit import set_gate
from loramix.pack.manifest import read_manifest, write_manifest
from loramix.runtime.llama.early_pass import EarlyPass
from loramix.runtime.llama.model import Model

SKILLS = ["sentiment", "summarize"]
TAGS = ["other", "text", "answer", *SKILLS, "base"]
LETTERS = {"S": "sentiment", "M": "summarize", "A": "answer", "B": "base"} | dict.fromkeys(
    "O:,.\n<|>_", "other"
)
INSTRUCTIONS = {"sentiment": "Rate: {input}", "summarize": "Sum:\n{input}"}
TEXT = "the soup was cold and the waiter rude"
TWO = f"MMM OO SSS: {TEXT}"
CHAIN = f"MMM OO SSS AA: {TEXT}"
ONE = f"MMM: {TEXT}"


def letter_head(base: Path) -> bytes:
    """Content of a gate.npz that decides by letters alone: it reads token embeddings, and its layers do nothing."""
    letters = [*map(chr, range(ord("a"), ord("z") + 1)), " ", *LETTERS]
    with closing(Model(base, use_extra_bufts=False)) as model:
        ids = [model.tokenize(letter)[0] for letter in letters]
        with closing(EarlyPass(model, [0], n_threads=1, max_tokens=len(ids))) as early:
            states = early.states(ids)
    centred = states - states.mean(1, keepdims=True)
    rows = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + 1e-5)
    wanted = np.array(
        [[LETTERS.get(letter, "text") == tag for tag in TAGS] for letter in letters], np.float64
    )
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    info = HeadInfo(
        skills=SKILLS,
        layers=[0],
        width=N_EMBD,
        d=N_EMBD,
        depth=1,
        tags=TAGS,
        threshold=0.1,
        base_sha256=bases.digest(base),
    )
    arrays = {name: np.zeros(shape, np.float32) for name, shape in expected(info).items()}
    for name in arrays:
        if name == "std" or (("norm" in name) and name.endswith("weight")):
            arrays[name] += 1
    arrays["project.weight"] = np.eye(N_EMBD, dtype=np.float32)
    arrays["tag.weight"] = (12 * weight).astype(np.float32)
    classes = weight[:, [TAGS.index(name) for name in [*SKILLS, "base"]]]
    arrays["out.weight"][-N_EMBD:] = 60 * classes  # of the mean over all tokens
    return EarlyHead(info, arrays).to_bytes()


def write_plan_pack(tiny_pack: Path, directory: Path, **changes: Any) -> Path:
    """Copy the tiny pack, with instructions and a gate that tags by letters; ``changes`` are fields of each skill."""
    shutil.copytree(tiny_pack, directory)
    manifest = read_manifest(directory)
    skills = tuple(
        msgspec.structs.replace(entry, **{"instruction": INSTRUCTIONS[entry.name], **changes})
        for entry in manifest.skills
    )
    write_manifest(directory, msgspec.structs.replace(manifest, skills=skills))
    set_gate(directory, letter_head(Path(manifest.base.name)))
    return directory
