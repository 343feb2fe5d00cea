"""Requests to train the early gate on: every skill and "none of them" in many wordings and the same styles."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from loramix.defaults import BASE
from loramix.models.message_reading import TEXT
from loramix.train.data import Row
from loramix.train.frames import framed
from loramix.train.gate_data import CROSSED, Phrasings, load_phrasings, templates_of
from loramix.train.gate_pieces import OTHER, UNKNOWN, Piece, Request, asked_by, filled, parsed, plain, user
from loramix.train.gate_styles import long_text, styled, words_of
from loramix.train.gate_wordings import Wordings, is_dev, load_wordings, of_part, sentence
from loramix.train.recipe import Recipe

SHORT, LONG = 500, 3000  # characters of a text
WHOLE_TEXTS = 0.5
"""Share of the texts with an instruction that are whole texts of the list."""
SINGLES = 0.4
"""Share of the requests about such texts that are marked templates, where there are any of the class."""
_MARK = "\0"
_KINDS = {"template": 0.46, "ask": 0.34, "long": 0.1, "tongue": 0.1}


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to ask."""

    kind: str
    """``template``, ``ask``, ``long`` or ``tongue``."""
    text: str
    source: str = ""
    """Source of the rows that it fits; empty: all."""


@dataclass
class Maker:
    """Makes requests of skills' recipes and training rows.

    Args:
        recipes: of each skill, the broad ones where there are any.
        rows: training rows of each skill.
        dev: make them of the wordings that training does not see; None: of all.
        seed: of all draws.
    """

    recipes: Mapping[str, Recipe]
    rows: Mapping[str, Sequence[Row]]
    dev: bool | None = False
    seed: int = 0
    phrasings: Phrasings = field(default_factory=load_phrasings)
    wordings: Wordings = field(default_factory=load_wordings)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}-{self.dev}")
        self.skills = list(self.recipes)
        self.general = [name for name in self.skills if self.recipes[name].any_text]
        self._by_source = {
            name: {
                source: [row for row in self.rows[name] if not source or row.source == source]
                for source in {"", *(w.source for w in self._all(name))}
            }
            for name in self.skills
        }
        self.pools = {name: self._pool(self._all(name)) for name in self.skills}
        self.pools[BASE] = self._pool(self._none())
        self._turn: dict[tuple[str, str], list[Wording]] = {}

    def _all(self, name: str) -> list[Wording]:
        recipe, more = self.recipes[name], self.wordings
        asks = [ask for group in recipe.asks.values() for ask in group] + more.asks.get(name, [])
        return [
            *(Wording("template", t, s) for t, s in templates_of(recipe, self.phrasings)),
            *(Wording("ask", ask) for ask in dict.fromkeys(asks)),
            *(Wording("long", t) for t in more.long.get(name, [])),
            *(Wording("tongue", t) for t in more.tongues.get(name, [])),
        ]

    def _none(self) -> list[Wording]:
        more = self.wordings
        return [
            *(Wording("template", t) for t in self.phrasings.none.templates),
            *(Wording("ask", t) for t in more.asks["none"]),
            *(Wording("long", t) for t in more.long["none"]),
            *(Wording("tongue", t) for t in more.tongues["none"]),
        ]

    def _pool(self, wordings: Sequence[Wording]) -> dict[str, list[Wording]]:
        part = [w for w in wordings if is_dev(w.text) == self.dev] or list(wordings)
        return {kind: found for kind in _KINDS if (found := [w for w in part if w.kind == kind])}

    @cached_property
    def whole(self) -> list[str]:
        """Whole templates for several of its skills, of its part."""
        known = [t for t in self.wordings.whole.templates if set(self.skills).issuperset(asked_by(t))]
        return of_part(known, dev=self.dev)

    @cached_property
    def singles(self) -> list[str]:
        """Whole templates for one of its skills or none that look like these, of its part."""
        classes = {*self.skills, BASE}
        known = [t for t in self.wordings.whole.singles if classes.issuperset(asked_by(t))]
        return of_part(known, dev=self.dev)

    @cached_property
    def _marked(self) -> dict[str, list[str]]:
        """Those of `singles` that ask for one class alone, by class."""
        found: dict[str, list[str]] = {}
        for template in self.singles:
            if len(names := asked_by(template)) == 1:
                found.setdefault(names[0], []).append(template)
        return found

    def draw(self, name: str) -> Wording:
        """A wording of a skill or of none, each used once before one comes again."""
        pool = self.pools[name]
        kinds = list(pool)
        kind = self.rng.choices(kinds, [_KINDS[k] for k in kinds])[0]
        deck = self._turn.setdefault((name, kind), [])
        if not deck:
            deck.extend(pool[kind])
            self.rng.shuffle(deck)
        return deck.pop()

    def any_text(self, own: str = "") -> str:
        """A text of any skill; of those whose texts are plain language, where ``own`` is one of them."""
        among = self.general if own in self.general and self.rng.random() < 0.8 else self.skills
        return self.rng.choice(self.rows[self.rng.choice(among)]).input

    def text_for(self, name: str, wording: Wording, crossed: bool | None = None) -> str:
        """A text to ask about.

        Args:
            name: skill, or ``base``.
            wording: the request.
            crossed: whether the text is another skill's; None: of a share of them.
        """
        rng = self.rng
        if name == BASE:
            text = self.any_text()
            if rng.random() < 0.12:  # premise and hypothesis, passage and question
                text = long_text([_short(text), _short(self.any_text())], 2 * SHORT)
        else:
            own = self._by_source[name][wording.source]
            if crossed is None:
                share = CROSSED if name in self.general else CROSSED / 3
                crossed = not wording.source and rng.random() < share
            text = self.any_text(name) if crossed or not own else rng.choice(own).input
        if rng.random() < 0.1 and (name == BASE or name in self.general):
            return long_text(
                [text, *(self.any_text("summarize") for _ in range(rng.randint(1, 5)))],
                rng.randint(SHORT, LONG),
            )
        return _short(text)

    def pieces(self, name: str, wording: Wording, text: str) -> tuple[Piece, ...]:
        """A wording around a text."""
        if wording.kind != "ask":
            return filled(wording.text, text, name)
        before, _, after = framed(wording.text, _MARK, self.rng).partition(_MARK)
        return tuple(p for p in (Piece(before, name), Piece(text, TEXT), Piece(after, name)) if p.text)

    def skill(self, name: str, *, crossed: bool | None = None, style: bool = True) -> Request:
        """A request for a skill."""
        wording = self.draw(name)
        pieces = self.pieces(name, wording, self.text_for(name, wording, crossed))
        return self._request(pieces, name, wording.text, wording.kind, style)

    def none(self, *, style: bool = True) -> Request:
        """A request about a text that no skill serves."""
        wording = self.draw(BASE)
        text = self.text_for(BASE, wording)
        if self.wordings.grammar and self.rng.random() < 0.22:
            made = sentence(self.wordings.grammar, words_of([Piece(text)]), self.rng, dev=self.dev)
            wording = Wording("ask", made)
        return self._request(
            self.pieces(BASE, wording, text), BASE, wording.text, "none " + wording.kind, style
        )

    def alone(self, text: str, kind: str, name: str = BASE) -> Request:
        """A whole message as it was typed, for a skill or by default for none."""
        return self._request((Piece(text, UNKNOWN),), name, text, kind, True)

    def embedded(self, name: str) -> Request:
        """A request about a text that holds an instruction; the request around it decides."""
        rng, lists = self.rng, self.wordings.embedded
        wording = self.draw(name)
        text = self.text_for(name, wording)[:SHORT]
        others = [other for other in (*self.general, BASE) if other != name] or [BASE]
        if rng.random() < 0.3:  # the text is a whole request of its own
            other = rng.choice(others)
            inner = self.draw(other)
            text = plain(self.pieces(other, inner, text))
        else:
            text = self.with_instruction(text, others)
        group = wording.text
        marked = self._marked.get(name)
        if marked and rng.random() < SINGLES:
            group = rng.choice(marked)
            pieces = parsed(group, text)
        elif wording.kind == "ask" and rng.random() < 0.6:
            frame = rng.choice(of_part(lists.frames, dev=self.dev))
            before = wording.text[:1].upper() + wording.text[1:]
            pieces = filled(frame.replace("{before}", before), text, name)
        else:
            pieces = self.pieces(name, wording, text)
        return self._request(pieces, name, group, "embedded", True)

    def with_instruction(self, text: str, among: Sequence[str]) -> str:
        """A text with an instruction in it: a whole one of the list, or this one with a note of one of some classes."""
        rng = self.rng
        if self.wordings.embedded.texts and rng.random() < WHOLE_TEXTS:
            return rng.choice(of_part(self.wordings.embedded.texts, dev=self.dev))
        note = rng.choice(of_part(self.wordings.embedded.notes, dev=self.dev))
        note = note.replace("{order}", self._order(rng.choice(among)))
        parts = text.split(". ")
        at = rng.choice((0, len(parts), rng.randint(0, len(parts))))
        return " ".join(part for part in (". ".join(parts[:at]), note, ". ".join(parts[at:])) if part)

    def _order(self, name: str) -> str:
        """A command of another class, as a note in a text gives it."""
        commands = [w.text for w in self.pools[name].get("ask", []) if not w.text.endswith("?")]
        if not commands or (name == BASE and self.rng.random() < 0.5):  # a pack's only skill may have none
            commands = of_part(self.wordings.embedded.orders, dev=self.dev)
        return self.rng.choice(commands)

    def styled(self, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        """Pieces in a style drawn at random, see `loramix.train.gate_styles.styled`."""
        return styled(pieces, self.wordings.styles, self.rng, dev=self.dev)

    def _request(self, pieces: tuple[Piece, ...], name: str, group: str, kind: str, style: bool) -> Request:
        turn = user(*(self.styled(pieces) if style else pieces))
        if not turn.text.strip():
            turn = user(Piece(group, OTHER))
        return Request((turn,), {name: 1.0}, group, kind)


def _short(text: str) -> str:
    """A long text's beginning, up to the end of a word."""
    return long_text([text], SHORT)
