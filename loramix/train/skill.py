"""Adding a skill to a pack: adapter, check, gate and files change together.

The gate is extended with the pack's feature bank, so the other skills' data are not needed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.convert.adapter import convert_adapter
from loramix.defaults import BASE
from loramix.errors import InvalidArtifact, InvalidData, NotFound, Unsupported, UsageError
from loramix.formats.sniff import HEAD, sniff
from loramix.formats.validate import check_adapter, read_adapter_bytes, read_base
from loramix.models import bases
from loramix.models.gate_bank import Bank
from loramix.models.gate_numpy import Floats, NumpyGate
from loramix.pack.edit import Change, NewGate, add_skill, check_skill_name
from loramix.pack.own import Target
from loramix.pack.pack import Pack
from loramix.prompts import fill
from loramix.runtime.children import adapter_effect, compute
from loramix.train.card import write_card
from loramix.train.data import Row
from loramix.train.gate import (
    converted,
    default_layers,
    describe,
    fitted,
    gate_info,
    groups_of,
    select,
    targets_of,
)
from loramix.train.gate_data import MAX_CHARACTERS, Prompt, load_phrasings, prompts_of, templates_of
from loramix.train.gate_extend import extend, fit_columns, kept_logits, moved_probabilities
from loramix.train.gate_fit import folds
from loramix.train.lora import Progress, train_skill
from loramix.train.recipe import RECIPES, Recipe, load_recipe

FIRST_PROMPTS = 200  # of a pack's first skill, for its gate
PROMPTS = 200  # their features are half of what an update costs
CONTRADICTED = 0.5


def add(
    target: Target,
    recipe: Recipe,
    rows: Sequence[Row],
    out: Path,
    *,
    adapter: Path | None = None,
    resume: bool = True,
    report: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
    replace_existing: bool = False,
) -> Change:
    """Train or import a skill's adapter, extend the gate, and add both to the pack in one change.

    Args:
        target: the pack; one that is not there yet is made at the end, with the skill in it.
        recipe: names and describes the skill.
        rows: its data; with ``adapter``, examples for the gate alone.
        out: directory for the training run.
        adapter: a PEFT or mlx-lm directory, or a GGUF LoRA; trained from ``rows`` if None.
        resume: resume an interrupted run.
        report: progress callback, called after each training step.
        say: callback for progress messages.
        replace_existing: replace a skill of the same name.

    Raises:
        UsageError: the pack already has the skill, or the name is invalid.
        InvalidArtifact: the adapter does not fit the pack's base.
        Busy: another process is changing the pack.
    """
    pack = target.pack
    name = check_skill_name(recipe.name)
    if any(skill.name == name for skill in pack.skills) and not replace_existing:
        raise UsageError(f"pack {pack.name} has a skill {name} already; remove it, or ask to replace it.")
    base = bases.resolve(pack.manifest.base.name)
    numbers = {
        "rows": sum(row.split == "train" for row in rows),
        "dev_loss": float("nan"),
        "dev_exact": float("nan"),
    }
    if adapter is None:
        result = train_skill(recipe, rows, base, out, resume=resume, report=report, say=say)
        numbers |= {"rows": result.rows, "dev_loss": result.dev_loss, "dev_exact": result.dev_exact}
        adapter = result.directory
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / f"{name}.gguf"
        if adapter.is_dir():
            convert_adapter(
                adapter,
                base,
                converted,
                base_name=pack.manifest.base.name,
                base_sha256=pack.manifest.base.sha256,
            )
        elif adapter.is_file():
            converted.write_bytes(adapter.read_bytes())
        else:
            raise NotFound(f"no adapter at {adapter}; give a PEFT or mlx-lm directory, or a GGUF LoRA file.")
        content = read_adapter_bytes(converted)
        check_adapter(content, read_base(base)[1], str(adapter), base_sha256=pack.manifest.base.sha256)
        say(f"the adapter moves the base's logits by up to {adapter_effect(base, converted):.2f}")
    alone = all(skill.name == name for skill in pack.skills)
    gate = (_first if alone else _extended)(pack, recipe, rows, base, out, say)
    with target.changing() as directory:
        change = add_skill(
            directory,
            name,
            content,
            description=recipe.description,
            max_tokens=recipe.max_tokens,
            example=recipe.example or None,
            card=write_card(recipe, pack.manifest.base.name, numbers),
            replace_existing=replace_existing,
            gate=gate,
        )
    return change._replace(pack=Pack.load(target.directory))


def _first(
    pack: Pack, recipe: Recipe, rows: Sequence[Row], base: Path, out: Path, say: Callable[[str], None]
) -> NewGate:
    """Fit a gate for a pack of one skill, which separates its prompts from all others."""
    texts = [row for row in rows if row.split == "train"] or rows
    if not texts:
        raise InvalidData(f"skill {recipe.name!r} has no examples; give rows with 'input' and 'target'.")
    prompts = prompts_of({recipe.name: recipe}, {recipe.name: texts}, FIRST_PROMPTS)
    layers = default_layers(read_base(base)[1].n_layer)
    info = gate_info([recipe.name], layers, "last", pack.manifest.base.sha256)
    out.mkdir(parents=True, exist_ok=True)
    features = select(compute(base, [p.text for p in prompts], layers, share=True), layers, "last")
    gate, scores, _ = fitted(features, prompts, info, out)
    say(f"gate: {describe(scores)}")
    return gate


def _extended(
    pack: Pack, recipe: Recipe, rows: Sequence[Row], base: Path, out: Path, say: Callable[[str], None]
) -> NewGate | None:
    """Extend the pack's gate by the new skill; None if the pack has no gate that can be extended."""
    bank, old = pack.gate_bank(), pack.gate()
    if bank is None or old is None:
        say("the pack has no feature bank; run `loramix train gate` to make one.")
        return None
    if not isinstance(old, NumpyGate):
        raise Unsupported("this gate cannot learn a skill by itself; run `loramix train gate` after it.")
    if recipe.name in bank.classes:
        bank = bank.without(recipe.name)
    known = list(bank.classes[:-1])
    prompts = prompts_for(recipe, rows, known)
    classes = [*known, recipe.name, BASE]
    states = compute(base, [p.text for p in prompts], old.info.layers, share=True)
    features = select(states, old.info.layers, old.info.pooling)
    longer = bank.extended(features, targets_of(prompts, classes[:-1]), groups_of(prompts), classes)
    logits = kept_logits(old, longer)
    keep = uncontradicted(longer, logits, len(known), len(bank.codes))
    if not keep.all():
        say(f"{int((~keep).sum())} prompts that were for no skill look like this one now, and are left out")
        longer, logits = longer.of_rows(keep), logits[keep]
    gate, changes = extend(old, longer, logits, len(known))
    say(
        f"gate: in phrasings that it was not fitted on, {changes.own:.1%} of the prompts for {recipe.name} "
        f"are decided right, and {changes.others:.1%} of all others as before"
    )
    out.mkdir(parents=True, exist_ok=True)
    return NewGate(converted(gate, out)[0], longer.to_bytes())


def prompts_for(recipe: Recipe, rows: Sequence[Row], known: Sequence[str], *, seed: int = 0) -> list[Prompt]:
    """Collect the prompts from which a gate learns a new skill.

    Half of them request it on its own texts; the others request it on other texts, or request another skill, or
    something that no skill serves, on its texts.

    Args:
        recipe: the new skill's.
        rows: its data.
        known: the pack's skills before.
        seed: of all draws.

    Raises:
        InvalidData: no rows to take texts from.
    """
    rng = random.Random(seed)
    texts = [row.input[:MAX_CHARACTERS] for row in rows if row.split == "train"] or [r.input for r in rows]
    if not texts:
        raise InvalidData(f"skill {recipe.name!r} has no examples; give rows with 'input' and 'target'.")
    phrasings = load_phrasings()
    templates = [template for template, _ in templates_of(recipe, phrasings)]
    rng.shuffle(templates)
    asked = [templates[i % len(templates)] for i in range(PROMPTS)]
    prompts = [Prompt(fill(t, rng.choice(texts)), {recipe.name: 1.0}, t) for t in asked[: PROMPTS // 2]]
    strange = phrasings.none.prompts
    prompts += [Prompt(fill(t, rng.choice(strange)), {recipe.name: 1.0}, t) for t in asked[: PROMPTS // 8]]
    shipped = [name for name in known if (RECIPES / f"{name}.toml").is_file()]
    others = [
        (template, name)
        for name in shipped
        if load_recipe(name).any_text
        for template, source in templates_of(load_recipe(name), phrasings)
        if not source
    ]
    for template, name in rng.sample(others, min(PROMPTS // 4, len(others))):
        prompts.append(Prompt(fill(template, rng.choice(texts)), {name: 1.0}, template))
    for template in rng.sample(phrasings.none.templates, PROMPTS // 8):
        prompts.append(Prompt(fill(template, rng.choice(texts)), {BASE: 1.0}, template))
    return prompts


def uncontradicted(bank: Bank, logits: Floats, place: int, old: int) -> npt.NDArray[np.bool_]:
    """Select the prompts to keep; drops prompts labelled "no skill" that look like requests for the new skill.

    "Translate this into German" fits no skill until one is added; the old texts are not available for relabelling.

    Args:
        bank: with the new skill's prompts behind the old ones.
        logits: (N, M, K+1), what the gate without it says to them.
        place: of the new skill among the bank's classes.
        old: how many prompts there were before.

    Returns:
        (N,) bool.
    """
    new = np.arange(len(bank.codes)) >= old
    was_none = (bank.targets[:, -1] > 0.999) & ~new
    components, fold = bank.components, folds(bank.groups)
    # a judge sees half of the requests for none: not too sure that a new wish was for none
    half = ~was_none | (np.arange(len(new)) % 2 == 0)
    seen = half[:, None] & (fold[:, None] != np.arange(fold.max(initial=0) + 1))
    keep = np.ones(len(new), bool)
    for i, judge in enumerate(fit_columns(logits, components, bank.targets, place, seen)):
        judged = np.flatnonzero((fold == i) & was_none)
        table = moved_probabilities(logits[judged], judge, components[judged], place, 1.0)
        keep[judged] = table[:, place] < CONTRADICTED
    return keep


def check_import(path: Path) -> None:
    """Check early that an adapter to import is a directory or a GGUF file.

    Raises:
        NotFound: the path does not exist.
        InvalidArtifact: the file is not GGUF.
    """
    if not path.exists():
        raise NotFound(f"no adapter at {path}; give a PEFT or mlx-lm directory, or a GGUF LoRA file.")
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(HEAD)
        if head[:4] != b"GGUF":
            what = sniff(head, path.stat().st_size) or "it does not begin with 'GGUF'"
            raise InvalidArtifact(
                f"{path} is not a GGUF LoRA: {what}; import a PEFT or mlx-lm directory, or a GGUF LoRA."
            )
