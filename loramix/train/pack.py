"""Training of a complete pack: each skill is trained, converted and added in turn; resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramix.convert.adapter import convert_adapter
from loramix.errors import UsageError
from loramix.models import bases
from loramix.pack.edit import add_skill, check_skill_name, new_pack
from loramix.pack.manifest import MANIFEST
from loramix.pack.pack import Pack
from loramix.paths import sha256_file, write_text
from loramix.templates.base_template import check_template
from loramix.train.card import write_card
from loramix.train.label_skill import calibrated, label_rows, labels_of
from loramix.train.lora import Progress, train_skill
from loramix.train.recipe import Recipe
from loramix.train.sources import data_files, rows_of

DONE = "done.json"


@dataclass(frozen=True, slots=True)
class SkillProgress:
    """Progress of training a pack: the current skill, its number, and its own progress."""

    skill: str
    number: int
    count: int
    progress: Progress | None
    """None if the adapter of an earlier run is used without training."""


def train_pack(
    directory: Path,
    recipes: Sequence[Recipe],
    data_dir: Path,
    out: Path,
    *,
    base: str,
    description: str = "",
    report: Callable[[SkillProgress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> Pack:
    """Train the adapters of all recipes and add them to a pack.

    Each skill has a run directory, ``OUT/NAME``: a finished one of the same recipe, data and base is not
    trained again, an unfinished one resumes from its last checkpoint.

    Args:
        directory: directory of the pack; created if missing. Skills of the same names are replaced.
        recipes: recipes to train, in this order.
        data_dir: directory with a data file per skill, or the files of its sources.
        out: directory of the run directories.
        base: name or GGUF file of the base.
        description: description of a new pack.
        report: progress callback, called after each optimizer step.
        say: callback for messages on rows that are dropped.

    Returns:
        The pack; it has no gate if a skill is new. A retrained skill keeps its class in the gate.

    Raises:
        UsageError: a name occurs twice, or the pack has another base.
        NotFound: a data file is missing; nothing has been trained.
    """
    names = [check_skill_name(recipe.name) for recipe in recipes]
    files = [data_files(recipe, data_dir) for recipe in recipes]
    if len(set(names)) != len(names):
        raise UsageError(f"{', '.join(names)} has a skill twice; name each skill once.")
    base_path = bases.resolve(base)
    check_template(base_path)
    base_digest = bases.digest(base_path)
    _open(directory, base, base_digest, description)
    for number, (recipe, paths) in enumerate(zip(recipes, files, strict=True), 1):
        run = out / recipe.name
        key = _key(recipe, paths, base_digest)

        def forward(progress: Progress, name: str = recipe.name, number: int = number) -> None:
            report(SkillProgress(name, number, len(recipes), progress))

        if not _is_done(run, key):
            rows = rows_of(recipe, data_dir)
            result = train_skill(recipe, rows, base_path, run, resume=True, report=forward, say=say)
            done = {
                "key": key,
                "rows": result.rows,
                "dev_loss": result.dev_loss,
                "dev_exact": result.dev_exact,
            }
            write_text(run / DONE, json.dumps(done, indent=1) + "\n")
        else:
            report(SkillProgress(recipe.name, number, len(recipes), None))
        _put(directory, recipe, data_dir, run, base, base_path, base_digest)
    return Pack.load(directory)


def _open(directory: Path, base: str, digest: str, description: str) -> None:
    """Create the pack if it is missing; check its base otherwise."""
    if not (directory / MANIFEST).exists():
        new_pack(directory, base, digest, description=description)
    found = Pack.load(directory).manifest.base
    if found.sha256 != digest:
        raise UsageError(
            f"{directory} is a pack on base {found.name}, not on {base}; name another directory."
        )


def _key(recipe: Recipe, data: Sequence[Path], base_digest: str) -> str:
    """Return a digest of recipe, data and base, to detect changes."""
    parts = [recipe.fingerprint(), *map(sha256_file, data), base_digest]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_done(run: Path, key: str) -> bool:
    path = run / DONE
    return path.is_file() and json.loads(path.read_text()).get("key") == key


def _put(
    directory: Path, recipe: Recipe, data_dir: Path, run: Path, base: str, base_path: Path, digest: str
) -> None:
    """Convert a trained adapter and add it to the pack, unless the pack has the same bytes, labels and instruction."""
    target = run / "adapter.gguf"
    convert_adapter(run / "adapter", base_path, target, base_name=base, base_sha256=digest)
    content = target.read_bytes()
    rows = label_rows(recipe, data_dir)
    known = {skill.name: skill for skill in Pack.load(directory).skills}.get(recipe.name)
    digest_now, labels = hashlib.sha256(content).hexdigest(), labels_of(recipe, rows)
    now = digest_now, labels, recipe.canonical
    if known is not None and (known.sha256, known.labels, known.instruction) == now:
        return
    done = json.loads((run / DONE).read_text())
    add_skill(
        directory,
        recipe.name,
        content,
        description=recipe.description,
        max_tokens=recipe.max_tokens,
        example=recipe.example or None,
        instruction=recipe.canonical,
        card=write_card(recipe, base, done),
        labels=calibrated(recipe, rows, base_path, target),
        replace_existing=True,
        keep_gate=True,
    )
