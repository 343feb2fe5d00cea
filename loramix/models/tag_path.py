"""The most probable reading of a message as words around a text, by dynamic programming over its tags.

Knows rows of numbers alone: which tag means what is the caller's business, except that of the text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CHANGE = 1.5
"""Cost, as negative log-probability, of another tag outside the text."""
_LEAST = 1e-4
_NEVER = -1e9

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def best_path(
    rows: Floats, weights: Floats, known: npt.NDArray[np.bool_], turns: Floats, text: int, blocks: int
) -> Ints:
    """Find the most probable tags of a message in which the text stands at most ``blocks`` times, uninterrupted.

    Args:
        rows: (U, N) probabilities of the tags of each unit, U at least 1.
        weights: (U,) how much each unit counts.
        known: (U,) whether a unit has probabilities; one that has none belongs to the text.
        turns: (U + 1,) cost of a beginning or end of the text before each unit, and behind the last one.
        text: number of the text's tag.
        blocks: how often the text may stand there.

    Returns:
        (U,) number of each unit's tag.
    """
    tags, phases = _states(rows.shape[1], text, blocks)
    score = np.log(np.maximum(rows, _LEAST))[:, tags] * weights[:, None]
    score[~known] = np.where(tags == text, 0.0, _NEVER)
    within, turning = _costs(tags, phases)
    back = np.zeros(score.shape, np.int64)
    in_text = phases % 2
    total = np.where(phases <= 1, score[0] - turns[0] * in_text, _NEVER)
    for i in range(1, len(score)):
        ways = total[:, None] - within - turns[i] * turning
        back[i] = ways.argmax(axis=0)
        total = ways.max(axis=0) + score[i]
    state = int((total - turns[-1] * in_text).argmax())
    path = np.zeros(len(score), np.int64)
    for i in range(len(score) - 1, -1, -1):
        path[i] = tags[state]
        state = int(back[i, state])
    return path


def _states(count: int, text: int, blocks: int) -> tuple[Ints, Ints]:
    """Tag and phase of each state; even phases are around the text, odd ones are the text."""
    around = [tag for tag in range(count) if tag != text]
    pairs = [(tag, phase) for phase in range(2 * blocks + 1) for tag in ([text] if phase % 2 else around)]
    tags, phases = np.asarray(pairs, np.int64).T
    return tags, phases


def _costs(tags: Ints, phases: Ints) -> tuple[Floats, Floats]:
    """(S, S) cost of each step from one state to another, and (S, S) 1 where the text begins or ends, else 0."""
    same, step = tags[:, None] == tags, phases - phases[:, None]
    allowed = np.where((step == 0) | (step == 1), 0.0, -_NEVER)
    return np.where((step == 0) & ~same, CHANGE, allowed), (step == 1).astype(np.float64)
