"""Label answers: the labels of a skill as a trie of tokens, and the search for the most probable label.

An answer follows the trie: at each branch the model's logits are restricted to the tokens that continue a label,
divided by the skill's calibration temperature (Guo et al. 2017) and normalized. Where only one token can follow, no
logits are needed. The probability of a label is the product over its branches, so all labels together have 1.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact, InvalidPrompt
from loramix.models.mixing import Mix
from loramix.models.softmax import log_softmax
from loramix.pack.manifest import SkillEntry
from loramix.pack.pack import Pack
from loramix.runtime.llama.vocabulary import Vocabulary
from loramix.runtime.sampling import Picker, TokenScore

ALL_LABELS = 16
"""Up to this number of labels, the probability of each one is computed."""
LISTED = 0.05
"""Of more labels, all with at least this probability are computed."""

Path: TypeAlias = tuple[int, ...]
"""Token ids from the beginning of an answer."""


class LabelTrie:
    """The labels of a skill as token sequences; each one ends with the end-of-turn token.

    Args:
        labels: pairs of a label and its token ids, the end-of-turn token included.
        temperature: calibration temperature; divides the logits at each branch.

    Raises:
        InvalidArtifact: two labels have the same tokens.
    """

    def __init__(self, labels: Sequence[tuple[str, Path]], temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.labels: dict[Path, str] = {}
        children: dict[Path, list[int]] = {}
        for label, tokens in labels:
            if tokens in self.labels:
                raise InvalidArtifact(
                    f"the labels {self.labels[tokens]!r} and {label!r} are the same tokens for this base; "
                    "rename one of them in pack.toml."
                )
            self.labels[tokens] = label
            for i, token in enumerate(tokens):
                known = children.setdefault(tokens[:i], [])
                if token not in known:
                    known.append(token)
        self._only = {path: tokens[0] for path, tokens in children.items() if len(tokens) == 1}
        self.branches = {path: tokens for path, tokens in children.items() if len(tokens) > 1}

    @classmethod
    def of(cls, vocabulary: Vocabulary, labels: Sequence[str], temperature: float = 1.0) -> LabelTrie:
        """Tokenize labels as training tokenizes answers."""
        pairs = [(label, (*vocabulary.tokenize(label), vocabulary.eot)) for label in labels]
        return cls(pairs, temperature)

    @property
    def depth(self) -> int:
        """Largest number of label tokens that must be decoded after a prompt."""
        return max(map(len, self.branches), default=0)

    def follow(self, path: Path) -> Path:
        """Extend a path to the next branch or to the end of its label."""
        while path in self._only:
            path = (*path, self._only[path])
        return path

    def calibrated(self, path: Path, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the logits of the K tokens that continue a label at a branch, divided by the temperature.

        Args:
            path: the branch.
            logits: (V,) float32 after the path.

        Returns:
            (K,) float32, in the order of ``branches[path]``.
        """
        return logits[self.branches[path]] / np.float32(self.temperature)


class ChosenLabel(NamedTuple):
    """A label that was chosen, and the probabilities of the labels."""

    label: str
    tokens: list[int]
    """Its token ids, without the end-of-turn token."""
    probabilities: dict[str, float]
    """Probability by label, in descending order; of more than `ALL_LABELS` labels, the most probable ones."""
    scores: list[TokenScore]
    """For each token its log-probability among the tokens that continue a label, and all of these."""


class LabelSearch:
    """The search for one answer: the most probable branch is decoded first.

    Args:
        trie: the labels.
        picker: samples a token at each branch; None takes the most probable label.
    """

    def __init__(self, trie: LabelTrie, picker: Picker | None = None) -> None:
        self._trie, self._picker = trie, picker
        self._logits: dict[Path, npt.NDArray[np.float32]] = {}  # calibrated, of the branches decoded so far
        self._values: dict[Path, npt.NDArray[np.float64]] = {}  # log-probabilities of their tokens
        self._complete: dict[Path, float] = {}  # log-probability of each label found so far
        self._open: list[tuple[float, Path]] = []  # heap of branches to decode
        self._reach(0.0, ())

    def run(self) -> Generator[Path, npt.NDArray[np.float32], ChosenLabel]:
        """Choose a label.

        Yields:
            Token ids after the prompt, first none; the logits after them, (V,) float32, must be sent back.
        """
        # the prompt alone comes first, so that what follows is decoded in the same batches every time
        self._after_prompt = yield ()
        while self._open and not self._is_enough():
            yield from self._decode(self._open[0][1])
        if self._picker is None:
            path = max(self._complete, key=lambda known: self._complete[known])
        else:
            path = yield from self._sampled(self._picker)
        found = sorted(self._complete.items(), key=lambda item: -item[1])
        return ChosenLabel(
            self._trie.labels[path],
            list(path[:-1]),
            {self._trie.labels[known]: math.exp(value) for known, value in found},
            [self._score(path, i) for i in range(len(path) - 1)],
        )

    def _reach(self, value: float, path: Path) -> None:
        path = self._trie.follow(path)
        if path in self._trie.labels:
            self._complete[path] = value
        else:
            heapq.heappush(self._open, (-value, path))

    def _is_enough(self) -> bool:
        if len(self._trie.labels) <= ALL_LABELS:
            return False
        best_open = -self._open[0][0]
        return best_open < math.log(LISTED) and best_open <= max(self._complete.values(), default=-math.inf)

    def _decode(self, path: Path) -> Generator[Path, npt.NDArray[np.float32], None]:
        (before,) = (-negative for negative, known in self._open if known == path)
        self._open = [item for item in self._open if item[1] != path]
        heapq.heapify(self._open)
        found = (yield path) if path else self._after_prompt
        logits = self._logits[path] = self._trie.calibrated(path, found)
        values = self._values[path] = log_softmax(logits)
        for token, value in zip(self._trie.branches[path], values, strict=True):
            self._reach(before + float(value), (*path, token))

    def _sampled(self, picker: Picker) -> Generator[Path, npt.NDArray[np.float32], Path]:
        path = self._trie.follow(())
        while path not in self._trie.labels:
            if path not in self._logits:
                yield from self._decode(path)
            # without recent tokens: penalties would make the labels improbable that the prompt names
            choice = picker.pick(self._logits[path], [])
            path = self._trie.follow((*path, self._trie.branches[path][choice]))
        return path

    def _score(self, path: Path, index: int) -> TokenScore:
        """Score of the token at an index of a path whose branches were decoded."""
        before, token = path[:index], path[index]
        if before not in self._values:
            return TokenScore(token, 0.0, [(token, 0.0)])
        pairs = zip(self._trie.branches[before], map(float, self._values[before]), strict=True)
        top = sorted(pairs, key=lambda pair: -pair[1])
        return TokenScore(token, dict(top)[token], top)


def label_fields(steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the JSON fields on labels of an answer; empty if no label skill answered.

    Args:
        steps: probability by label for each mix that answered; empty for free text.

    Returns:
        ``labels``, of the first label skill; of several mixes also ``step_labels``, one object per mix.
    """
    rounded = [{label: round(p, 6) for label, p in labels.items()} for labels in steps]
    labels: dict[str, float] = next(filter(None, rounded), {})
    if not labels:
        return {}
    return {"labels": labels, **({"step_labels": rounded} if len(rounded) > 1 else {})}


def check_room(tries: Sequence[LabelTrie | None], n_prompt: int, n_ctx: int) -> None:
    """Check that the context holds a prompt and the label tokens that must be decoded after it.

    Args:
        tries: labels of each step of an answer; None for a step in free text.
        n_prompt: number of prompt tokens.
        n_ctx: maximum tokens of prompt and answer together.

    Raises:
        InvalidPrompt: it does not.
    """
    depth = max((trie.depth for trie in tries if trie is not None), default=0)
    if n_prompt + depth > n_ctx:
        raise InvalidPrompt(
            f"the prompt has {n_prompt} tokens and the skill's labels need {depth} more; the context holds {n_ctx}: "
            "shorten the prompt, or give a larger --ctx."
        )


class LabelTries:
    """The tries of a pack's label skills, built on first use.

    Args:
        vocabulary: vocabulary of the base.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tries: dict[SkillEntry, LabelTrie] = {}

    def of(self, pack: Pack, mix: Mix) -> LabelTrie | None:
        """Return the labels of a mix of exactly one label skill; None for any other mix.

        Raises:
            UnknownSkill: the mix names a skill that the pack lacks.
        """
        if len(mix.entries) != 1:
            return None
        entry = pack.skill(mix.entries[0][0])
        if not entry.labels:
            return None
        if entry not in self._tries:
            self._tries = {known: trie for known, trie in self._tries.items() if known in pack.skills}
            self._tries[entry] = LabelTrie.of(self._vocabulary, entry.labels, entry.label_temperature or 1.0)
        return self._tries[entry]
