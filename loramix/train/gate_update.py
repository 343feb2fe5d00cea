"""A pack's gate after a skill is added: a new one for the first skill, one more class for others.

The gate is extended with the pack's feature bank, so the other skills' data are not needed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE
from loramix.errors import InvalidData
from loramix.formats.validate import read_base
from loramix.models.early_head import EarlyHead
from loramix.pack.edit import NewGate
from loramix.pack.pack import Pack
from loramix.runtime.children import token_states
from loramix.train.data import Row
from loramix.train.gate import default_layer
from loramix.train.gate_collect import collect_requests
from loramix.train.gate_data import templates_of
from loramix.train.gate_extend import extend, kept_logits, uncontradicted
from loramix.train.gate_pieces import Request, filled, user
from loramix.train.gate_requests import SHORT, Maker
from loramix.train.gate_run import Run, drained, groups_of, targets_of, turns_of
from loramix.train.gate_turns import conversation
from loramix.train.head_fit import FitSettings
from loramix.train.head_states import TokenStates
from loramix.train.recipe import RECIPES, Recipe, load_recipe

Floats = npt.NDArray[np.float32]
FIRST_PROMPTS = 120
"""Requests for a pack's first skill; `collect_requests` makes five times as many others."""
PROMPTS = 240
"""Requests for a further skill, and about as many others; reading them is most of what an update costs."""


def gate_with(
    pack: Pack, recipe: Recipe, rows: Sequence[Row], base: Path, out: Path, say: Callable[[str], None]
) -> NewGate | None:
    """Make the gate of a pack with one more skill, or with a replaced one.

    Args:
        pack: the pack before.
        recipe: names and describes the skill.
        rows: its data.
        base: GGUF file of the pack's base.
        out: directory for states.
        say: callback for progress messages.

    Returns:
        The gate and its bank; None if the pack has no gate that can be extended.

    Raises:
        InvalidData: no rows to take texts from.
    """
    alone = all(skill.name == recipe.name for skill in pack.skills)
    return (_first if alone else _extended)(pack, recipe, rows, base, out, say)


def _first(
    pack: Pack, recipe: Recipe, rows: Sequence[Row], base: Path, out: Path, say: Callable[[str], None]
) -> NewGate:
    """Train a gate for a pack of one skill, which separates its prompts from all others."""
    texts = _texts(recipe, rows)
    train, dev = (
        collect_requests({recipe.name: recipe}, {recipe.name: texts}, [], per_skill=count, dev=dev)
        for count, dev in ((FIRST_PROMPTS, False), (FIRST_PROMPTS // 4, True))
    )
    shape = read_base(base)[1]
    run = Run(base, shape, [recipe.name], pack.manifest.base.sha256, out / "gate", FitSettings())
    layers = (default_layer(shape.n_layer),)
    data = drained(run.read(train, dev, layers), say)
    gate, scores = drained(run.gate(data, layers), say)
    shutil.rmtree(out / "gate", ignore_errors=True)
    say(f"gate: {scores}")
    return gate


def _extended(
    pack: Pack, recipe: Recipe, rows: Sequence[Row], base: Path, out: Path, say: Callable[[str], None]
) -> NewGate | None:
    """Extend the pack's gate by the new skill; None if the pack has no gate that can be extended."""
    bank, old = pack.gate_bank(), pack.gate()
    if bank is None or not isinstance(old, EarlyHead):
        say("the pack has no gate that can be extended; run 'loramix train gate' to make one.")
        return None
    if recipe.name in bank.classes:
        bank = bank.without(recipe.name)
    known = list(bank.classes[:-1])
    requests = requests_for(recipe, _texts(recipe, rows), known)
    classes = [*known, recipe.name, BASE]
    pooled = pooled_vectors(base, old, requests)
    longer = bank.extended(pooled, targets_of(requests, classes[:-1]), groups_of(requests), classes)
    logits = kept_logits(old, longer)
    keep = uncontradicted(longer, logits, len(known), len(bank.codes))
    if not keep.all():
        say(f"{int((~keep).sum())} prompts that were for no skill look like this one now, and are left out")
        longer, logits = longer.of_rows(keep), logits[keep]
    gate, changes = extend(old, longer, logits, len(known))
    say(
        f"gate: in wordings that it was not fitted on, {changes.own:.1%} of the prompts for {recipe.name} "
        f"are decided right, and {changes.others:.1%} of all others as before"
    )
    return NewGate(gate.to_bytes(), longer.to_bytes())


def _texts(recipe: Recipe, rows: Sequence[Row]) -> Sequence[Row]:
    """The training rows, or all where there are none of that split.

    Raises:
        InvalidData: no rows to take texts from.
    """
    texts = [row for row in rows if row.split == "train"] or list(rows)
    if not texts:
        raise InvalidData(f"skill {recipe.name!r} has no examples; give rows with 'input' and 'target'.")
    return texts


def pooled_vectors(base: Path, gate: EarlyHead, requests: Sequence[Request]) -> Floats:
    """Input of a gate's last linear map for each request, (N, 6 d) float32."""
    turns = [turns_of(request, []) for request in requests]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for _ in token_states(base, turns, gate.info.layers, directory):
            pass
        states = TokenStates.load(directory, gate.info.layers, np.zeros((len(requests), 1), np.float32))
        rows = np.arange(len(requests))
        return np.stack([gate(states.batch(rows[i : i + 1]).states[0].numpy()).pooled for i in rows])


def requests_for(
    recipe: Recipe, rows: Sequence[Row], known: Sequence[str], *, seed: int = 0
) -> list[Request]:
    """Requests on which a gate is trained for a new skill.

    Half of them request it on its own texts; the others are follow-ups, request it on other texts, or request another
    skill, or something that no skill serves, on its texts.

    Args:
        recipe: the new skill's.
        rows: its training rows.
        known: the pack's skills before.
        seed: of all draws.
    """
    maker = Maker({recipe.name: recipe}, {recipe.name: rows}, seed=seed)
    rng = maker.rng
    found = [maker.skill(recipe.name) for _ in range(PROMPTS // 2)]
    found += [maker.embedded(recipe.name) for _ in range(PROMPTS // 16)]
    found += [maker.none() for _ in range(PROMPTS // 8)]
    found += [conversation(maker) for _ in range(PROMPTS // 5)]

    def asked(template: str, text: str, name: str) -> Request:
        pieces = maker.styled(filled(template, text[:SHORT], name))
        return Request((user(*pieces),), {name: 1.0}, template, "asked")

    own = [template for template, _ in templates_of(recipe, maker.phrasings)]
    strange = maker.phrasings.none.prompts
    found += [asked(rng.choice(own), rng.choice(strange), recipe.name) for _ in range(PROMPTS // 8)]
    others = [
        (template, name)
        for name in known
        if (RECIPES / f"{name}.toml").is_file() and load_recipe(name).any_text
        for template, source in templates_of(load_recipe(name), maker.phrasings)
        if not source
    ]
    for template, name in rng.sample(others, min(PROMPTS // 4, len(others))):
        found.append(asked(template, rng.choice(rows).input, name))
    return found
