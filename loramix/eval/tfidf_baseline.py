"""Baseline for the gate: TF-IDF and logistic regression, trained on the gate's prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loramix.eval.routing import Question
from loramix.train.gate_data import Prompt
from loramix.train.metrics import bootstrap, share


def baseline_accuracy(
    prompts: Sequence[Prompt], sets: Mapping[str, Sequence[Question]]
) -> dict[str, dict[str, float]]:
    """Fit the baseline and evaluate it.

    Args:
        prompts: prompts from `loramix.train.gate_data.collect`; those for several skills are dropped, because the
            baseline is single-label.
        sets: sets from `loramix.eval.routing.questions`.

    Returns:
        Accuracy by set: ``{set: {value, low, high, rows}}``.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import FeatureUnion, make_pipeline

    single = [prompt for prompt in prompts if len(prompt.target) == 1]
    # word and character n-grams: the strongest combination among those tried
    union = FeatureUnion(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)),
            ("pieces", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=2)),
        ]
    )
    model: Any = make_pipeline(union, LogisticRegression(C=10.0, max_iter=300, class_weight="balanced"))
    model.fit([prompt.text for prompt in single], [next(iter(prompt.target)) for prompt in single])
    found = {}
    for name, group in sets.items():
        chosen = model.predict([question.text for question in group])
        hits = [[choice == q.wanted, 1] for choice, q in zip(chosen, group, strict=True)]
        value = bootstrap(np.asarray(hits, np.float64), share)
        found[name] = {"value": value.value, "low": value.low, "high": value.high, "rows": value.rows}
    return found
