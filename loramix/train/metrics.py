"""Measures of a skill's answers, each a function of summed counts, so that one bootstrap works for all of them.

Each row gives a vector of counts (right and total; true positives, found and expected; n-gram matches, …), and a
measure's value is a function of the sum of these vectors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.train.data import Row
from loramix.train.recipe import MeasureName, Recipe

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of a skill: ``value(sum of counts(answer, row) over rows)``."""

    counts: Callable[[str, Row], Sequence[float]]
    """(answer, row) -> counts, always with the same length."""
    value: Callable[[Floats], Floats]
    """(…, S) sums -> (…) values."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % bootstrap interval over rows."""

    value: float
    low: float
    high: float
    rows: int


def estimate(measure: Measure, answers: Sequence[str], rows: Sequence[Row]) -> Estimate:
    """Compute the value of a measure with its interval.

    Args:
        measure: the measure.
        answers: one answer per row.
        rows: rows with references.
    """
    counts = [measure.counts(answer, row) for answer, row in zip(answers, rows, strict=True)]
    return bootstrap(np.asarray(counts, np.float64), measure.value)


def bootstrap(
    counts: Floats, value: Callable[[Floats], Floats], rounds: int = 2000, seed: int = 0
) -> Estimate:
    """Compute a bootstrap interval by resampling rows (Efron 1979).

    Args:
        counts: (B, S), one vector per row.
        value: (…, S) sums -> (…) values.
        rounds: number of resamples.
        seed: seed of the resampling.
    """
    size, rng = len(counts), np.random.default_rng(seed)
    # with the number of draws of each row, the sums of all resamples are one matrix product
    draws = rng.multinomial(size, np.full(size, 1 / size), rounds).astype(np.float64)
    low, high = np.quantile(value(draws @ counts), [0.025, 0.975])
    return Estimate(float(value(counts.sum(0))), float(low), float(high), size)


def share(sums: Floats) -> Floats:
    """Mean of a score: (…, 2) of (score, rows)."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def f1(sums: Floats) -> Floats:
    """F1 over all rows: (…, 3) of (true positives, found, expected)."""
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)


def macro_f1(sums: Floats) -> Floats:
    """Mean F1 of the classes: (…, 3 * classes); absent classes count 0, as in scikit-learn."""
    mean: Floats = f1(sums.reshape(*sums.shape[:-1], -1, 3)).mean(-1)
    return mean


def normal(answer: str) -> str:
    """Normalize a label: case-folded, without surrounding space and final full stop."""
    return answer.strip().rstrip(".").casefold()


_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|No|approx|a\.m|p\.m|U\.S|e\.g|i\.e|et al)\.")
_END = re.compile(r"[.!?](?=[\s\"']|$)")


def is_sentence(text: str) -> bool:
    """Return whether a text is one sentence of at least six words on one line."""
    plain = _ABBREVIATION.sub("", text).rstrip("\"' ")
    return (
        "\n" not in text and len(_END.findall(plain)) == 1 and plain[-1] in ".!?" and len(text.split()) >= 6
    )


def _accuracy(answer: str, row: Row) -> Sequence[float]:
    return (normal(answer) in {normal(text) for text in row.references}, 1)


def _exact(answer: str, row: Row) -> Sequence[float]:
    wanted = {" ".join(text.split()) for text in row.references}
    return (" ".join(answer.split()) in wanted, 1)


def _first_word(answer: str, row: Row) -> Sequence[float]:
    words = answer.split()
    return (bool(words) and words[0] == row.target.split()[0], 1)


def _of_labels(labels: Sequence[str], answer: str, row: Row) -> Sequence[float]:
    found, wanted = normal(answer), normal(row.target)
    counts: list[float] = []
    for label in map(normal, labels):
        counts += [found == wanted == label, found == label, wanted == label]
    return counts


def overlap(found: Counter[Any], wanted: Counter[Any]) -> Sequence[float]:
    """Return (true positives, found, expected) of two multisets."""
    return ((found & wanted).total(), found.total(), wanted.total())


def parse_entities(text: str) -> Counter[tuple[str, str]]:
    """Parse (type, name) pairs from "type: name; type: name", or from "none"."""
    pairs = (part.split(":", 1) for part in text.split(";") if ":" in part)
    return Counter((kind.strip().casefold(), name.strip().casefold()) for kind, name in pairs)


def _entities(answer: str, row: Row) -> Sequence[float]:
    return overlap(parse_entities(answer), parse_entities(row.target))


def parse_frame(text: str) -> dict[str, Any] | None:
    """Extract the JSON object in an answer; empty if there is none."""
    try:
        frame = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return frame if isinstance(frame, dict) else None


def _valid_json(answer: str, row: Row) -> Sequence[float]:
    return (parse_frame(answer) is not None, 1)


def _frame_intent(answer: str, row: Row) -> Sequence[float]:
    return ((parse_frame(answer) or {}).get("intent") == (parse_frame(row.target) or {}).get("intent"), 1)


def _slots(answer: str, row: Row) -> Sequence[float]:
    def pairs(text: str) -> Counter[tuple[str, str]]:
        frame = parse_frame(text) or {}
        return Counter((key, str(value).casefold()) for key, value in frame.items() if key != "intent")

    return overlap(pairs(answer), pairs(row.target))


def _rouge(answer: str, row: Row) -> Sequence[float]:
    """ROUGE-L F1 with stemming, the best over the references (Lin 2004; package rouge-score)."""
    scorer = _rouge_scorer()
    return (max(scorer.score(text, answer)["rougeL"].fmeasure for text in row.references), 1)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def chrf(answer: str, reference: str) -> float:
    """Return the chrF score of one sentence, 0 to 100."""
    return float(_chrf().sentence_score(answer, [reference]).score)


def _chrf_counts(answer: str, row: Row) -> Sequence[float]:
    # corpus_score does not return its counts per row
    counts: list[float] = _chrf()._extract_corpus_statistics([answer], [list(row.references[:1])])[0]
    return counts


def _chrf_value(sums: Floats) -> Floats:
    """chrF, 0 to 100 (Popović 2015; package sacrebleu)."""
    flat = sums.reshape(-1, sums.shape[-1])
    values = [_chrf()._compute_f_score(row.tolist()) for row in flat]
    return np.asarray(values, np.float64).reshape(sums.shape[:-1])


_ATTRIBUTE = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")
_FAMILY = re.compile(r"famil|child|kid|adult|all ages", re.IGNORECASE)
_SAID = {  # paraphrases of values in E2E's texts
    "less than £20": r"£20|cheap|low|inexpensive|affordable",
    "£20-25": r"£?20.{0,4}25|moderate|average|mid",
    "more than £30": r"£30|high|expensive|over £",
    "cheap": r"cheap|low|inexpensive|affordable|budget",
    "moderate": r"moderate|average|mid|reasonabl|medium|fair",
    "high": r"high|expensive|excellent|great|top|well|pric[ey]",
    "low": r"low|poor|bad|not well|1",
    "average": r"average|moderate|ok|decent|mid|3",
    "1 out of 5": r"\b1\b|one|low|poor",
    "3 out of 5": r"\b3\b|three|average",
    "5 out of 5": r"\b5\b|five|high|excellent",
    "city centre": r"cit(y|ies).{0,3}cent|centre|center|downtown|city",
    "riverside": r"river",
    "Fast food": r"fast.food",
    "coffee shop": r"coffee|café|cafe",
}


def attributes(text: str) -> list[tuple[str, str]]:
    """Parse (name, value) pairs from "name[The Mill], area[riverside]"."""
    return [(key.strip(), value.strip()) for key, value in _ATTRIBUTE.findall(text)]


def _slot_recall(answer: str, row: Row) -> Sequence[float]:
    """Count the input's attributes that the answer mentions, literally or in a usual paraphrase."""
    pairs = attributes(row.input)
    said = 0
    for key, value in pairs:
        if key == "familyFriendly":
            said += bool(_FAMILY.search(answer))
        else:
            pattern = _SAID.get(value)
            said += bool(
                re.search(pattern, answer, re.IGNORECASE)
                if pattern
                else value.casefold() in answer.casefold()
            )
    return (said, len(pairs))


MEASURES: dict[MeasureName, Measure] = {
    "accuracy": Measure(_accuracy, share),
    "exact": Measure(_exact, share),
    "first_word": Measure(_first_word, share),
    "entity_f1": Measure(_entities, f1),
    "valid_json": Measure(_valid_json, share),
    "frame_intent": Measure(_frame_intent, share),
    "slot_f1": Measure(_slots, f1),
    "rouge_l": Measure(_rouge, share),
    "slot_recall": Measure(_slot_recall, share),
    "chrf": Measure(_chrf_counts, _chrf_value),
}


def measure(name: MeasureName, labels: Sequence[str] = ()) -> Measure:
    """Return a measure by name.

    Args:
        name: its name in a recipe; ``positive_f1`` is the F1 of the last label.
        labels: the recipe's labels, for measures over classes.
    """
    if name == "macro_f1":
        return Measure(partial(_of_labels, labels), macro_f1)
    if name == "positive_f1":
        return Measure(partial(_of_labels, labels[-1:]), f1)
    return MEASURES[name]


def kept(rows: Sequence[Row], recipe: Recipe) -> list[Row]:
    """Drop the ``train`` rows whose target scores below the recipe's ``keep``.

    Args:
        rows: rows of all splits.
        recipe: the recipe; ``keep`` may be empty.
    """
    if recipe.keep is None:
        return list(rows)
    judge = measure(recipe.keep, recipe.labels)

    def perfect(row: Row) -> bool:
        value = judge.value(np.asarray(judge.counts(row.target, row), np.float64))
        return bool(value >= (100 if recipe.keep == "chrf" else 1))

    return [row for row in rows if row.split != "train" or perfect(row)]
