"""Requests for two and three skills with the words that ask for each, and others that look like them.

The lists are in ``phrasings/early/composed.toml``, whose head explains the marks, and ``composed_whole.toml``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loramix.defaults import BASE
from loramix.models.clauses import is_refused, spans_of, with_text
from loramix.models.message_reading import ANSWER, TEXT
from loramix.models.text_frame import Span
from loramix.train.gate_pieces import (
    MARK,
    OTHER,
    UNKNOWN,
    Piece,
    Request,
    asked_by,
    filled,
    parsed,
    plain,
    user,
)
from loramix.train.gate_requests import LONG, SHORT, Maker
from loramix.train.gate_styles import long_text
from loramix.train.gate_wordings import of_part

_SLOT = re.compile(r"\{(do|ask|get|tag|Tag|asks)\}")
_SENTENCE = re.compile(r"(^|[.?!]\s+|\n\W*)\Z")
_WHOLE_TEMPLATE, _THREE, _OWN, _CHAIN, _OLD, _NOTE = 0.6, 0.12, 0.25, 0.12, 0.1, 0.2
"""Shares of requests: from whole templates; of the others for three skills, about texts of a skill that needs its own,
for a summary in French, from templates without marks; and with an instruction inside the text."""
CLAUSE = "clause"
"""Kind of the requests that are clauses of others: no user types them."""
_ON_ANSWER, _WHOLE_TEXT = 0.25, 0.25
"""Shares of steps that work on the answer of the step before, where they can; and of translations after a summary that
do not."""
_THIS = ("it", "it", "it", "it", "this", "this", "the text", "the text", "this text", "that", "the following")
_WHOLE = ("the text", "the whole text", "all of it", "the original", "the full text", "the entire text")


def composed(maker: Maker) -> Request | None:
    """A request for two or three skills at once; None where no two of the skills can be asked for at once."""
    rng = maker.rng
    if maker.whole and rng.random() < _WHOLE_TEMPLATE:
        template = rng.choice(maker.whole)
        names: Sequence[str] = asked_by(template)
        pieces = parsed(template, _text(maker, names))
    elif (found := _skills(maker)) is None:
        return None
    else:
        names = found
        old = maker.phrasings.composed.get("+".join(sorted(names)), [])
        if old and rng.random() < _OLD:
            template = rng.choice(of_part(old, dev=maker.dev))
            pieces = filled(template, _text(maker, names), UNKNOWN)
        else:
            template = _framed(maker, names)
            pieces = parsed(template, _text(maker, names))
    target = dict.fromkeys(names, 1.0 / len(names))
    return Request((user(*maker.styled(pieces)),), target, template, "composed")


def clause_of(maker: Maker) -> Request | None:
    """A clause of a request for several skills with the first words of its text, as `loramix.models.clauses` reads it.

    None where there is no such request, or where the clause that was drawn asks for several things.
    """
    request = composed(maker)
    if request is None or any(piece.tag == UNKNOWN for piece in request.turns[0].pieces):
        return None
    places, at = list[tuple[Span, str]](), 0
    for piece in request.turns[0].pieces:
        places.append(((at, at + len(piece.text)), piece.tag))
        at += len(piece.text)
    texts = [span for span, tag in places if tag == TEXT]
    clauses = spans_of(request.text, texts)
    if not clauses:
        return None
    first, last = maker.rng.choice(clauses)
    asked = {t for (a, b), t in places if t not in (OTHER, TEXT, ANSWER) and a < last and first < b}
    words = request.text[first:last]
    if len(asked) > 1 or is_refused(words):
        return None
    alone = Piece(with_text(words, request.text[slice(*texts[0])]), UNKNOWN)
    return Request((user(alone),), {next(iter(asked), BASE): 1.0}, request.group, CLAUSE)


def alike(maker: Maker) -> Request:
    """A request that looks as if it were for two skills, but is for one, or for none because of one of its wishes."""
    rng, lists = maker.rng, maker.wordings.composed
    known = [name for name in maker.general if name in lists.asks]
    draw = rng.random()
    if maker.singles and draw < 0.7:
        template = rng.choice(maker.singles)
        names = asked_by(template)
        kind = "two verbs" if BASE not in names else "two for none" if len(names) == 1 else "partly served"
        return _request(maker, template, names[0] if len(names) == 1 else BASE, kind)
    commands = [w.text for w in maker.pools[BASE].get("ask", []) if not w.text.endswith("?")]
    wishes = [f"[{BASE}: {ask}]" for ask in rng.sample(commands, 2)]
    kind = "two for none"
    if known and draw < 0.87:  # what no skill serves makes the whole request the base's
        name = rng.choice(known)
        wishes[0] = _ask(maker, name, "do")
        kind = "partly served"
        rng.shuffle(wishes)
    frames = [f for f in of_part(lists.frames.two, dev=maker.dev) if set(_SLOT.findall(f)) == {"do"}]
    return _request(maker, _placed(maker, rng.choice(frames), wishes), BASE, kind)


def _request(maker: Maker, template: str, name: str, kind: str) -> Request:
    pieces = parsed(template, _text(maker, [name]))
    return Request((user(*maker.styled(pieces)),), {name: 1.0}, template, kind)


def _skills(maker: Maker) -> list[str] | None:
    """Two or three skills that one text can be given to, in the order of the steps."""
    rng, lists = maker.rng, maker.wordings.composed
    general = [name for name in maker.general if name in lists.asks]
    partners = {
        own: found
        for own, others in lists.partners.items()
        if own in maker.skills and (found := [name for name in others if name in general])
    }
    if partners and (rng.random() < _OWN or len(general) < 2):
        own = rng.choice(sorted(partners))
        pair = [own, rng.choice(partners[own])]
        return pair if rng.random() < 0.75 else pair[::-1]
    if len(general) < 2:
        return None
    if {"summarize", "translate_fr"} <= set(general) and rng.random() < _CHAIN:
        return ["summarize", "translate_fr"]
    return rng.sample(general, 3 if len(general) > 2 and rng.random() < _THREE else 2)


def _text(maker: Maker, names: Sequence[str]) -> str:
    """A text for all of the skills, sometimes long, sometimes with an instruction in it."""
    rng = maker.rng
    own = [name for name in names if name not in (*maker.general, BASE)]
    if own:
        return long_text([rng.choice(maker.rows[own[0]]).input], SHORT)
    text = maker.any_text(names[0])
    if rng.random() < _NOTE:
        return maker.with_instruction(long_text([text], SHORT), list(maker.pools))
    if rng.random() < 0.12:
        return long_text([text, *(maker.any_text("summarize") for _ in range(3))], rng.randint(SHORT, LONG))
    return long_text([text], SHORT)


def _framed(maker: Maker, names: Sequence[str]) -> str:
    """A marked template of a frame and the skills' short asks."""
    rng, frames = maker.rng, maker.wordings.composed.frames
    kind = rng.choices(("asks", "around", "fields"), (0.82, 0.1, 0.08))[0]
    plain_frames = frames.two if len(names) == 2 else frames.three
    chosen = {"asks": plain_frames, "around": frames.around, "fields": frames.fields}[kind]
    about = ["", *(_about(maker, names[i], names[i + 1]) for i in range(len(names) - 1))]

    def fits(frame: str) -> bool:
        slots = _SLOT.findall(frame)
        keywords = [slot.lower() == "tag" for slot in slots]  # they do not say what they are about
        return len(slots) == len(names) and not any(a and k for a, k in zip(about, keywords, strict=True))

    among = [frame for frame in of_part(chosen, dev=maker.dev) if fits(frame)]
    frame = rng.choice(among or [frame for frame in plain_frames if fits(frame)])
    slots = _SLOT.findall(frame)
    wishes = [_ask(maker, *parts) for parts in zip(names, slots, about, strict=True)]
    return _placed(maker, frame, wishes)


def _about(maker: Maker, before: str, name: str) -> str:
    """What a step has to say that it is about, with marks: an answer, or all of the text; empty: anything."""
    rng, answers = maker.rng, maker.wordings.composed.asks[before].answer
    if not answers or name not in maker.general or name in ("summarize", "spam"):
        return ""
    # "it" after a summary is the summary, if it is to be translated
    chain = name == "translate_fr"
    if chain and rng.random() < _WHOLE_TEXT:
        return rng.choice(_WHOLE)
    if not chain and rng.random() >= _ON_ANSWER:
        return ""
    return f"] [{ANSWER}: {rng.choice([*answers, *(['it'] * 3 if chain else [])])}] [{name}:"


def _ask(maker: Maker, name: str, slot: str, about: str = "") -> str:
    """A short ask of a skill with marks.

    Args:
        maker: makes requests.
        name: skill.
        slot: form: a command, a question, a noun or a keyword.
        about: what it has to say that it is about; empty: anything that means the text, or nothing.
    """
    lists = maker.wordings.composed.asks[name]
    forms = {"do": lists.do, "ask": lists.ask, "get": lists.get}.get(slot, lists.tag)
    among = [f for f in forms if "{it}" in f or not about] or [f for f in lists.do if "{it}" in f]
    ask = maker.rng.choice(of_part(among, dev=maker.dev))
    if slot == "Tag":
        ask = ask[:1].upper() + ask[1:]
    marked = f"[{name}: {ask.replace('{it}', about or maker.rng.choice(_THIS))}]"
    # a step's words on both sides of those for the answer, with the space between them outside the marks
    return re.sub(rf"\s*\[{re.escape(name)}:\s*\]", "", marked.replace(" ] [", "] [")).replace(":  ", ": ")


def _placed(maker: Maker, frame: str, wishes: Sequence[str]) -> str:
    """A frame with its asks, put before or behind the text where the frame does not say where the text is."""
    rng = maker.rng
    proper = rng.random() < 0.7
    left = list(wishes)

    def filled_in(template: str) -> str:
        found, at = "", 0
        for slot in _SLOT.finditer(template):
            found += template[at : slot.start()]
            wish = asks if slot[1] == "asks" else left.pop(0)
            if proper and _SENTENCE.search(MARK.sub(r"\2", found)):
                wish = re.sub(r"^(\[[\w-]+: )?(.)", lambda m: (m[1] or "") + m[2].upper(), wish, count=1)
            found, at = found + wish, slot.end()
        return found + template[at:]

    asks = filled_in(frame)
    if "{input}" in frame:
        return asks
    place = rng.choice(of_part(maker.wordings.composed.frames.places, dev=maker.dev))
    if plain(parsed(asks, ""))[-1:] in "?.\n":
        place = place.replace("{asks}: ", "{asks} ").replace("{asks}:", "{asks}").replace("{asks}.", "{asks}")
    return filled_in(place)
