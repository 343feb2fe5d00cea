"""All requests that an early gate is trained on, or chosen on: made ones, and files of people's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loramix.defaults import BASE
from loramix.errors import InvalidData, NotFound
from loramix.train.data import Row, data_file, has_data, read_rows, take
from loramix.train.gate_composed import alike, clause_of, composed
from loramix.train.gate_data import request_lines
from loramix.train.gate_pieces import UNKNOWN, Piece, Request, user
from loramix.train.gate_requests import Maker
from loramix.train.gate_turns import conversation, pasted
from loramix.train.gate_wordings import is_dev
from loramix.train.recipe import RECIPES, Recipe, load_recipe, recipe_beside
from loramix.train.sources import gather

EMBEDDED, BARE = 0.3, 0.2
"""How many of a kind there are for each request of a skill: with instructions inside the text (a skill), and texts
alone (all skills together)."""
NONE, TURNS, COMPOSED, CLAUSES, ALIKE = 0.5, 0.65, 0.7, 0.2, 0.16
"""How many requests for none, conversations, requests for several skills, clauses of such and requests that look like
these there are for each request of all skills."""
AT_LEAST = 1.5
"""How many of both there are at least, for each request of one skill: a pack of one skill has few others to tell
it from."""


def read_requests(path: Path) -> list[tuple[str, str, str, str]]:
    """Requests in people's own words.

    Args:
        path: JSONL of ``text``, or of ``instruction`` with ``instances`` that have an ``input``; optional are
            ``split``, ``skill`` (none: no skill serves it) and ``template``, the wording that several lines share.

    Returns:
        (split or empty, skill or ``base``, text, wording) of each line.

    Raises:
        NotFound: there is no such file.
        InvalidData: a line that cannot be read.
    """
    if not path.is_file():
        raise NotFound(f"no file {path} of requests; give one with --none FILE.")
    found = []
    for number, row, whole in request_lines(path):
        skill = row.get("skill", "none")
        if not isinstance(skill, str) or not whole.strip():
            raise InvalidData(
                f"{path}, line {number}: needs a text, and a skill that is a name or absent; fix it."
            )
        label = BASE if skill == "none" else skill
        found.append((str(row.get("split", "")), label, whole, str(row.get("template", whole))))
    return found


def requests_of_people(maker: Maker, path: Path) -> list[Request]:
    """The requests of a file for training, or those that training does not see.

    Rows of split ``test`` are left out; in a file with a split ``val`` or ``dev``, that one is kept from training,
    else a share of the wordings. Requests for skills that the maker does not know are left out too.

    Raises:
        NotFound, InvalidData: see `read_requests`.
    """
    rows = read_requests(path)
    own = any(split in ("val", "dev") for split, *_ in rows)
    found = []
    for split, label, text, wording in rows:
        held = split in ("val", "dev") if own else is_dev(wording)
        if split == "test" or held != maker.dev or label not in (*maker.skills, BASE):
            continue
        turn = user(Piece(text, UNKNOWN))
        if maker.rng.random() < 0.3 and not maker.dev:
            turn = user(*maker.styled(turn.pieces))
        found.append(Request((turn,), {label: 1.0}, wording, "people's words"))
    return found


def collect_requests(
    recipes: Mapping[str, Recipe],
    rows: Mapping[str, Sequence[Row]],
    files: Sequence[Path],
    *,
    per_skill: int = 700,
    dev: bool = False,
    seed: int = 0,
) -> list[Request]:
    """Requests for all skills and none.

    Args:
        recipes: of each skill.
        rows: of each skill, of ``train``, or of ``dev`` where ``dev`` is true.
        files: see `read_requests`.
        per_skill: single requests made for each skill; the other kinds grow with it.
        dev: only wordings that training does not see.
        seed: of all draws.

    Raises:
        NotFound, InvalidData: see `read_requests`.
    """
    maker = Maker(recipes, rows, dev=dev, seed=seed)
    found = [request for path in files for request in requests_of_people(maker, path)]
    for name in maker.skills:
        found += [maker.skill(name) for _ in range(per_skill)]
        found += [maker.embedded(name) for _ in range(round(per_skill * EMBEDDED))]
        typed = [text for text in maker.wordings.messages.get(name, []) if is_dev(text) == dev]
        found += [maker.alone(text, "messages", name) for text in typed]
    both = per_skill * len(maker.skills)
    none, turns = (round(max(share * both, AT_LEAST * per_skill)) for share in (NONE, TURNS))
    found += [maker.none() for _ in range(none)]
    found += [maker.embedded(BASE) for _ in range(round(per_skill * EMBEDDED * 3))]
    found += [conversation(maker) for _ in range(turns)]
    found += [pasted(maker, maker.any_text()[:500]) for _ in range(round(per_skill * BARE))]
    found += [r for _ in range(round(both * COMPOSED)) if (r := composed(maker)) is not None]
    found += [r for _ in range(round(both * CLAUSES)) if (r := clause_of(maker)) is not None]
    found += [alike(maker) for _ in range(round(both * ALIKE))]
    alone = [t for t in (*maker.phrasings.none.prompts, *maker.wordings.tasks) if is_dev(t) == dev]
    found += [maker.alone(text, "alone") for text in maker.rng.sample(alone, min(none, len(alone)))]
    return found


def collect_from(
    skills: Sequence[str], data_dir: Path, files: Sequence[Path], *, per_skill: int = 700, dev: bool = False
) -> list[Request]:
    """`collect_requests` of a directory with a data file per skill, or with the files of the broad recipes' sources.

    Raises:
        NotFound: a recipe or a data file is missing.
        InvalidRecipe, InvalidData: one that cannot be read.
    """
    recipes, rows = {}, {}
    for name in skills:
        recipes[name], rows[name] = _rows(name, data_dir, 4 * per_skill, dev)
    return collect_requests(recipes, rows, files, per_skill=per_skill, dev=dev)


def _rows(name: str, data_dir: Path, limit: int, dev: bool) -> tuple[Recipe, list[Row]]:
    """A skill's recipe, and rows of its own file, or of the broad recipe's sources where there is no such file."""
    broad = f"broad/{name}"
    if (RECIPES / f"{broad}.toml").is_file() and not has_data(data_dir, name):
        recipe = load_recipe(broad)
        every = gather(recipe, data_dir)
    else:
        recipe = recipe_beside(data_dir, name)
        every = read_rows(data_file(data_dir, name))
    split = "dev" if dev and any(row.split == "dev" for row in every) else "train"
    return recipe, take(every, split, limit)
