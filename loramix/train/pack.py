"""Training of a complete pack: each skill is trained, converted and added in turn; resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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


@dataclass(frozen=True, slots=True)
class SkillRun:
    """The training of one skill of a pack, in a run directory of its own."""

    recipe: Recipe
    data_dir: Path
    directory: Path
    base: Path
    """GGUF file of the base."""
    key: str
    """Digest of recipe, data and base."""

    @property
    def is_done(self) -> bool:
        """Whether the run directory has the adapter of this recipe, data and base."""
        path = self.directory / DONE
        return path.is_file() and json.loads(path.read_text()).get("key") == self.key

    def train(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Train the adapter, or resume from the last checkpoint; see `train_skill`."""
        rows = rows_of(self.recipe, self.data_dir)
        result = train_skill(
            self.recipe, rows, self.base, self.directory, resume=True, report=report, say=say
        )
        done = {
            "key": self.key,
            "rows": result.rows,
            "dev_loss": result.dev_loss,
            "dev_exact": result.dev_exact,
        }
        write_text(self.directory / DONE, json.dumps(done, indent=1) + "\n")


Trainer = Callable[[Sequence[SkillRun]], Iterable[SkillRun]]
"""Trains the runs that are not done, and yields each run when it is."""


def one_by_one(
    report: Callable[[SkillProgress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> Trainer:
    """Return a trainer that trains in this process, one skill after another.

    Args:
        report: progress callback, called after each optimizer step.
        say: callback for messages on rows that are dropped.
    """

    def trainer(runs: Sequence[SkillRun]) -> Iterator[SkillRun]:
        for number, run in enumerate(runs, 1):

            def forward(progress: Progress | None, name: str = run.recipe.name, number: int = number) -> None:
                report(SkillProgress(name, number, len(runs), progress))

            if run.is_done:
                forward(None)
            else:
                run.train(forward, say)
            yield run

    return trainer


def train_pack(
    directory: Path,
    recipes: Sequence[Recipe],
    data_dir: Path,
    out: Path,
    *,
    base: str,
    description: str = "",
    trainer: Trainer | None = None,
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
        trainer: trains the skills; by default `one_by_one`.

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
    runs = [
        SkillRun(recipe, data_dir, out / recipe.name, base_path, _key(recipe, paths, base_digest))
        for recipe, paths in zip(recipes, files, strict=True)
    ]
    for run in (trainer or one_by_one())(runs):
        _put(directory, run, base, base_digest)
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


def _put(directory: Path, run: SkillRun, base: str, digest: str) -> None:
    """Convert a trained adapter and add it to the pack, unless the pack has the same bytes, labels and instruction."""
    recipe = run.recipe
    target = run.directory / "adapter.gguf"
    convert_adapter(run.directory / "adapter", run.base, target, base_name=base, base_sha256=digest)
    content = target.read_bytes()
    rows = label_rows(recipe, run.data_dir)
    known = {skill.name: skill for skill in Pack.load(directory).skills}.get(recipe.name)
    digest_now, labels = hashlib.sha256(content).hexdigest(), labels_of(recipe, rows)
    now = digest_now, labels, recipe.canonical
    if known is not None and (known.sha256, known.labels, known.instruction) == now:
        return
    done = json.loads((run.directory / DONE).read_text())
    add_skill(
        directory,
        recipe.name,
        content,
        description=recipe.description,
        max_tokens=recipe.max_tokens,
        example=recipe.example or None,
        instruction=recipe.canonical,
        card=write_card(recipe, base, done),
        labels=calibrated(recipe, rows, run.base, target),
        replace_existing=True,
        keep_gate=True,
    )
