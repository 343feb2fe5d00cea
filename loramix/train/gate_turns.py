"""Conversations to train the early gate on: the class of a follow-up depends on the turns before it."""

from __future__ import annotations

from loramix.defaults import BASE
from loramix.models.message_reading import TEXT
from loramix.train.gate_pieces import UNKNOWN, Piece, Request, Turn, filled, user
from loramix.train.gate_requests import SHORT, Maker
from loramix.train.gate_styles import styled
from loramix.train.gate_wordings import of_part

_FOLLOWS = {
    "again": 0.33,
    "bare": 0.04,
    "refine": 0.13,
    "switch": 0.15,
    "chat": 0.1,
    "base": 0.1,
    "new": 0.1,
    "none": 0.05,
}
"""Share of each kind of turn after a skill's answer."""
_AFTER_BASE = {
    "again": 0.28,
    "refine": 0.08,
    "chat": 0.14,
    "base": 0.15,
    "switch": 0.12,
    "new": 0.14,
    "none": 0.09,
}
"""Share of each kind of turn after an answer of the base."""


def conversation(maker: Maker) -> Request:
    """A conversation of two or three turns of the user, whose last one is to be routed.

    "And this one?" asks for the last task again, also with a "why?" or "thanks" between; a new request is routed
    by its own words.
    """
    rng = maker.rng
    skill = rng.choice(maker.skills) if rng.random() < 0.8 else BASE
    first = maker.skill(skill) if skill != BASE else maker.none()
    turns, task, kind = [*first.turns], skill, "first"
    last, group = skill, first.group
    for _ in range(rng.choice((1, 1, 2))):
        turns.append(Turn("assistant", (Piece(answer(maker, last)),)))
        kind, last, group, pieces = follow(maker, task, last)
        turns.append(user(*pieces))
        task = task if kind == "chat" else last
    return Request(tuple(turns), {last: 1.0}, group, f"turns {kind}")


def follow(maker: Maker, task: str, last: str) -> tuple[str, str, str, tuple[Piece, ...]]:
    """A follow-up.

    Args:
        maker: makes requests.
        task: what served the last task.
        last: what answered last; ``base`` after a remark.

    Returns:
        Its kind, what is to serve it, its wording, and the message.
    """
    rng, lists, dev = maker.rng, maker.wordings.turns, maker.dev
    kinds = _FOLLOWS if last != BASE else _AFTER_BASE
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    known = sorted(set(lists.switch) & set(maker.skills))
    if kind == "refine" and last not in lists.refine and task != BASE:
        kind = "again"
    if kind == "switch" and not known:
        kind = "new"
    if kind in ("again", "bare"):
        template = "{input}" if kind == "bare" else rng.choice(of_part(lists.again, dev=dev))
        text = maker.any_text() if task == BASE else rng.choice(maker.rows[task]).input
        return kind, task, template, filled(template, text[:SHORT], task)
    if kind == "refine":
        among = lists.refine[last if last != BASE else rng.choice(sorted(lists.refine))]
        wording = rng.choice(of_part(among, dev=dev))
        return kind, last, wording, _said(maker, wording, last)
    if kind == "switch":
        skill = rng.choice([name for name in known if name != last] or known)
        wording = rng.choice(of_part(lists.switch[skill], dev=dev))
        return kind, skill, wording, _said(maker, wording, skill)
    if kind == "new":
        request = maker.skill(rng.choice(maker.skills))
        return kind, next(iter(request.target)), request.group, request.turns[0].pieces
    if kind == "none":
        request = maker.none()
        return kind, BASE, request.group, request.turns[0].pieces
    wording = rng.choice(of_part(lists.chat if kind == "chat" else lists.base, dev=dev))
    return kind, BASE, wording, _said(maker, wording, BASE)


def _said(maker: Maker, wording: str, tag: str) -> tuple[Piece, ...]:
    pieces: tuple[Piece, ...] = (Piece(wording, tag),)
    if maker.rng.random() < 0.3:
        return styled(pieces, maker.wordings.styles, maker.rng, dev=maker.dev)
    return pieces


def answer(maker: Maker, name: str) -> str:
    """An answer as a skill or the base gives it."""
    if name != BASE:
        return maker.rng.choice(maker.rows[name]).target
    if maker.rng.random() < 0.3:
        return maker.any_text()[:SHORT]
    return maker.rng.choice(maker.wordings.turns.answers["texts"])


def pasted(maker: Maker, text: str) -> Request:
    """A text without any request: nothing that a skill serves."""
    return Request((user(Piece(text, TEXT)),), {BASE: 1.0}, UNKNOWN, "bare text")
