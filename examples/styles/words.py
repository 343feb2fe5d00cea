"""Words to styles: "a bold italic R" through the package's own gate, which tags each word with the style it asks for.

A word enters as a vector that its spelling alone decides, where a language model has its token embeddings. Knows
nothing about pictures.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence

import numpy as np

from loramix.models.early_head import EarlyHead, Floats
from loramix.models.head_info import HeadInfo

from .fonts import STYLES
from .glyphs import CHARACTERS

WIDTH = 96
"""Numbers of a word's vector (D)."""
OTHER = "other"
TAGS = [*STYLES, OTHER]
COUNT, UNKNOWN = 3000, 0.5
"""Requests to train on, and the share of their other words that are replaced by words that nobody knows."""

WORDS = {
    "bold": ["bold", "heavy", "thick", "fat", "strong", "boldface"],
    "italic": ["italic", "slanted", "oblique", "leaning", "tilted", "cursive"],
    "serif": ["serif", "serifed", "with serifs", "with feet", "bookish", "roman"],
    "outline": ["outlined", "hollow", "outline", "contour", "empty inside", "outlines only"],
    "hand": ["handwritten", "handwriting", "by hand", "scribbled", "written with a pen", "handwriting style"],
    "typewriter": ["typewriter", "monospaced", "monospace", "fixed width", "typewritten", "courier"],
}
FORMS = [
    "a {} {}", "draw a {} {}", "the letter {1} in {0}", "{1}, {0}", "please make {1} {0}", "write {1} {0}",
    "I want a {} {}", "{} {}", "show me the character {1}, {0}", "one {} {} please",
]  # fmt: skip
HELD_OUT_FORMS = [
    "let me see a {} {}",
    "our logo needs its {1} {0}",
    "{0} would suit this {1}",
    "can you do {0} for {1}",
]
PLAIN = ["plain", "normal", "", "simple", "ordinary", "nice", "regular"]
JOINS = [" ", " and ", ", ", " but also "]

Tagged = list[tuple[str, str]]
"""The words of a request, each with its tag."""


def words_of(text: str) -> list[str]:
    """Words and single letters, in lower case."""
    return re.findall(r"\w+", text.lower())


def states(words: Sequence[str]) -> Floats:
    """The words' vectors: (T, WIDTH) float32, normal numbers from each word's checksum."""
    rows = [np.random.default_rng(zlib.crc32(word.encode())).standard_normal(WIDTH) for word in words]
    return np.array(rows, np.float32).reshape(len(words), WIDTH)


def requests(forms: Sequence[str], count: int, seed: int) -> list[Tagged]:
    """Made-up requests for none to three styles."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        styles = rng.sample(STYLES, rng.choice([0, 1, 1, 2, 2, 3]))
        before, after = rng.choice(forms).format("\0", rng.choice(CHARACTERS)).split("\0")
        pieces = [(before, OTHER)]
        for i, style in enumerate(styles):
            pieces += [(rng.choice(JOINS) if i else "", OTHER), (rng.choice(WORDS[style]), style)]
        pieces += [("" if styles else rng.choice(PLAIN), OTHER), (after, OTHER)]
        found.append([(word, tag) for text, tag in pieces for word in words_of(text)])
    return found


def named(request: Tagged) -> tuple[str, ...]:
    """The styles that a request asks for, sorted."""
    return tuple(sorted({tag for _, tag in request} - {OTHER}))


def train() -> EarlyHead:
    """Train the gate with the package's own loop."""
    from loramix.train.head_fit import FitSettings, fit
    from loramix.train.head_states import TokenStates

    rng = random.Random(0)
    rows = requests(FORMS, COUNT, 0)
    known = [
        word if tag != OTHER or rng.random() >= UNKNOWN else f"unknown {rng.random()}"
        for row in rows
        for word, tag in row
    ]
    targets = np.zeros((len(rows), len(STYLES) + 1), np.float32)
    for i, row in enumerate(rows):
        for style in named(row):
            targets[i, STYLES.index(style)] = 1 / len(named(row))
        targets[i, -1] = not named(row)
    data = TokenStates(
        layers=[states(known)],
        lengths=np.array([len(row) for row in rows], np.int64),
        targets=targets,
        tags=np.array([TAGS.index(tag) for row in rows for _, tag in row], np.int8),
    )
    info = HeadInfo(skills=list(STYLES), layers=[0], width=WIDTH, d=32, depth=1, tags=TAGS)
    # the tags alone name the styles: one probability cannot be shared by three of them
    loop = fit(data, np.arange(len(rows)), info, FitSettings(dropped=0.0, tag_weight=1.0))
    while True:
        try:
            next(loop)
        except StopIteration as done:
            return EarlyHead(info, done.value.arrays())


def all_named(gate: EarlyHead) -> float:
    """Share of requests in other words around the styles' own, whose styles are all named and no other."""
    asked = requests(HELD_OUT_FORMS, 500, 1)
    return float(np.mean([styles_of(gate, " ".join(w for w, _ in row)) == named(row) for row in asked]))


def styles_of(gate: EarlyHead, text: str) -> tuple[str, ...]:
    """Styles that a text asks for, sorted: those that the gate tags a word with."""
    words = words_of(text)
    if not words:
        return ()
    tags = gate(states(words)).tags.argmax(1)
    return tuple(sorted({TAGS[tag] for tag in tags.tolist()} - {OTHER}))


def letter_of(text: str) -> str | None:
    """The letter or digit that a text asks for: its last single one; a small "a" is an article."""
    single = re.findall(r"(?<![\w'])(\w)(?![\w'])", text)
    capital = [c for c in single if c in CHARACTERS]
    small = [c.upper() for c in single if c != "a" and c.upper() in CHARACTERS]
    return (capital or small or [None])[-1]
