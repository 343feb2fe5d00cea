"""A file cache of an engine's answers, so that an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from loramix.defaults import DEFAULT_POLICY
from loramix.errors import UsageError
from loramix.models.mixing import Mix
from loramix.pack.manifest import SkillEntry
from loramix.pack.pack import Pack
from loramix.paths import open_lines
from loramix.runtime.engine import Engine

Prompt = str | Sequence[Mapping[str, str]]


def source(pack: Pack, *, mix: str | None = None, **_: Any) -> list[Any]:
    """Return the parts of a pack that determine an answer: base and skills of the mix, or all skills and the gate."""
    names = Mix.parse(mix).scales if mix is not None else [skill.name for skill in pack.skills]
    entries = [pack.skill(name) for name in names]
    skills = [
        (s.name, s.sha256, s.max_tokens, *(s.closed_labels if s.labels else ()), *_asked(s, mix))
        for s in entries
    ]
    gate = pack.manifest.gate.sha256 if mix is None and pack.manifest.gate else None
    return [pack.manifest.base.sha256, skills, gate]


def _asked(skill: SkillEntry, mix: str | None) -> tuple[str, ...]:
    """The instruction with which a step of a plan asks for a skill, which no answer of a fixed mix depends on."""
    return (skill.instruction,) if mix is None and skill.instruction else ()


@dataclass(frozen=True, slots=True)
class Given:
    """One answer and its mix."""

    text: str
    mix: dict[str, float]
    labels: dict[str, float] | None = None
    """Probabilities of the labels, if a label skill answered."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The gate's choice for a prompt."""

    mix: dict[str, float]
    then: list[dict[str, float]]
    """Further mixes that would answer in turn."""
    steps: list[dict[str, Any]]
    """Steps of a plan, see `Step.to_json`; empty if the prompt is answered as one."""
    probabilities: dict[str, float]


class AnswerStore:
    """A JSONL file of greedy answers by prompt, options and pack, and of the gate's choices by prompt.

    Each prompt is answered once per mix, for all measures. If a part of the pack changes, only answers that depend
    on it are generated again.

    Args:
        path: path of the file; created if it does not exist.

    Raises:
        UsageError: the file has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        head = {"loramix answers": 1}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes]
        if path.is_file() and path.stat().st_size:
            opened = open_lines(path, json.dumps(head).encode() + b"\n")
            if opened is None:
                raise UsageError(f"{path} has no answers of this version; delete it, or give another --out.")
            self._file, lines = opened
            for line in lines:
                row = json.loads(line)
                self._known[row.pop("key")] = row
        else:
            self._file = path.open("wb")
            self._write(head)

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def answer(self, engine: Engine, prompt: Prompt, **options: Any) -> Given:
        """Return the greedy answer to a prompt, from the file if it is known.

        Args:
            engine: the engine that answers.
            prompt: text or messages.
            **options: ``mix`` or ``policy``, ``max_tokens``, ``stop``.
        """

        def find() -> dict[str, Any]:
            found = engine.generate(prompt, **options)
            labels = {"labels": found.labels} if found.labels else {}
            return {"text": found.text, "mix": found.route.mix, **labels}

        return Given(**self._once([prompt, sorted(options.items()), source(engine.pack, **options)], find))

    def route(self, engine: Engine, prompt: str) -> Chosen:
        """Return the gate's choice for a prompt, from the file if it is known.

        Args:
            engine: see `answer`.
            prompt: the prompt.
        """

        def find() -> dict[str, Any]:
            found = engine.route(prompt)
            steps = [step.to_json() for step in found.plan]
            return {
                "mix": found.mix,
                "then": list(found.then),
                "steps": steps,
                "probabilities": found.probabilities,
            }

        return Chosen(**self._once([prompt, "route with steps", DEFAULT_POLICY, source(engine.pack)], find))

    def _once(self, named: Any, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = hashlib.sha256(json.dumps(named, ensure_ascii=False).encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key] = find()
            self._write({"key": key, **self._known[key]})
        return self._known[key]

    def answers(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        *,
        tick: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> list[Given]:
        """Return the answers to several prompts with the same options.

        Args:
            engine: see `answer`.
            prompts: the prompts.
            tick: progress callback, called after each prompt.
            **options: see `answer`.
        """
        found = []
        for prompt in prompts:
            found.append(self.answer(engine, prompt, **options))
            tick()
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
