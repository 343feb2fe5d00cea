"""Training recipes: a TOML file that describes a skill, its prompts and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from loramix.architectures import Module
from loramix.defaults import MAX_RANK, RANK
from loramix.errors import InvalidRecipe, NotFound
from loramix.formats.textfile import read_text
from loramix.pack.manifest import usable_instruction
from loramix.paths import is_safe_name

T = TypeVar("T")
Positive = Annotated[int, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
MeasureName = Literal[
    "accuracy", "chrf", "entity_f1", "exact", "first_word", "frame_intent", "macro_f1",
    "positive_f1", "rouge_l", "slot_f1", "slot_recall", "valid_json",
]  # fmt: skip
MadeName = Literal[
    "brief", "emotion", "facts", "sentiment", "shell", "spam", "sql", "summarize", "title", "translate_fr"
]
"""Rows that `loramix.train.made_rows` generates."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class DataSource(_Table, frozen=True):
    """One of several files of a recipe, and its share of a sample."""

    file: str = ""
    """Path relative to the data directory, without ``.jsonl.gz``."""
    made: MadeName | Literal[""] = ""
    """Name of generated rows, instead of a file (see `loramix.train.made_rows`)."""
    take: tuple[str, ...] = ()
    """Values of ``source`` of the rows to use; by default all."""
    weight: Annotated[float, Meta(gt=0)] = 1.0
    """Share of a sample relative to the other sources; a sample never has a row twice."""
    instructions: tuple[str, ...] = ("any",)
    """Groups of the recipe's instructions and asks for these rows."""
    target: str | None = None
    """Target that replaces those of all rows, for texts of another task that belong to one class."""
    rename: dict[str, str] = {}
    """Entity types to replace in the targets, old to new."""
    target_rates: dict[str, Fraction] = {}
    """Share of the rows to keep by target, for classes that are too frequent; by default all."""
    one_sentence: bool = False
    """Whether to use only training rows with a target of one sentence."""
    schema_forms: bool = False
    """Whether to rewrite each row's database schema in a random form (see `loramix.train.schema_forms`)."""


class Source(_Table, frozen=True):
    """The source of the data: a dataset on the hub, or how to create the file."""

    license: str
    how: str
    hub: str | None = None
    rows: Positive = 12000
    """Number of rows of a sample over several sources."""
    sources: tuple[DataSource, ...] = ()
    """Files of a data directory, sampled by weight; if empty, the skill's single file."""


class Lora(_Table, frozen=True):
    """Shape of the adapter; names as in PEFT's LoraConfig."""

    r: Annotated[int, Meta(ge=1, le=MAX_RANK)] = RANK
    lora_alpha: Annotated[float, Meta(gt=0)] = 32
    lora_dropout: Fraction = 0.0
    use_rslora: bool = False
    target_modules: tuple[Module, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    skip_lowest: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the base's layers, from the bottom, without matrices. No gradient passes through them: skipping a
    third of the layers saves a sixth of the work and a third of the file."""

    def layers(self, count: int) -> list[int]:
        """Return the indices of the adapted layers, of ``count`` layers of the base."""
        return list(range(int(self.skip_lowest * count), count))


class Training(_Table, frozen=True):
    """The optimizer's settings."""

    epochs: Annotated[float, Meta(gt=0)] = 1.0
    """Number of passes over the training rows."""
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    """Maximum learning rate, reached after the warm-up; then cosine decay to a tenth of it."""
    warmup: Fraction = 0.05
    """Share of warm-up steps in a round."""
    rounds: Positive | Annotated[tuple[Positive, ...], Meta(min_length=1)] = 1
    """Warm restarts (arXiv 1608.03983): parts of the run, each with its own warm-up, decay and optimizer state; a
    number of equal parts, or their relative lengths."""
    batch_size: Positive = 16
    """Number of examples per optimizer step."""
    micro_batch_tokens: Positive = 2048
    """Maximum number of tokens in a forward pass, including padding; bounds memory."""
    max_length: Positive = 1024
    """Maximum length of an example in tokens; a long input is cut, a row with a long answer is dropped."""
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    gradient_clip: Annotated[float, Meta(gt=0)] = 1.0
    evaluate_every: Positive = 100
    """Optimizer steps between evaluations on dev."""
    save_every: Positive = 50
    """Optimizer steps between checkpoints."""
    dev_rows: Positive = 256
    """Number of dev rows to evaluate."""
    seed: int = 0

    @property
    def parts(self) -> tuple[int, ...]:
        """Relative lengths of the rounds."""
        return self.rounds if isinstance(self.rounds, tuple) else (1,) * self.rounds


class Recipe(_Table, frozen=True):
    """Everything `loramix train skill` needs besides the base and the data file."""

    name: str
    description: str
    metrics: Annotated[list[MeasureName], Meta(min_length=1)]
    """Measures of `loramix.train.metrics`, the main one first."""
    data: Source
    instructions: dict[str, list[str]]
    """Instruction templates with ``{input}``; the key ``any`` fits all rows, others a row's ``source``."""
    asks: dict[str, list[str]] = {}
    """Short requests without the text, by group like the instructions; `loramix.train.frames` puts them before or
    after a text."""
    any_text: bool = False
    """Whether the instruction is meaningful for any text, as for "summarize" but not for "write the SQL"."""
    labels: list[str] = []
    """Allowed answers of a classification task."""
    max_tokens: Positive = 64
    """Maximum number of tokens of an answer at run time."""
    example: str = ""
    """An example prompt."""
    keep: MeasureName | None = None
    """Train only on rows with a target that is perfect by this measure, e.g. sentences with all facts."""
    activation: Literal["always", "answer"] = "always"
    """Where the adapter is active: on all tokens, or from the answer's header on (`loramix.train.activated_lora`)."""
    lora: Lora = Lora()
    training: Training = Training()

    @property
    def canonical(self) -> str | None:
        """The instruction with which the skill is asked in a plan: the recipe's first one, if a pack can hold it."""
        return usable_instruction(next(group[0] for group in self.instructions.values() if group))

    def fingerprint(self) -> str:
        """Return a digest of the settings that affect training; a new description or example does not change it."""
        late = ("answer",) if self.activation == "answer" else ()
        kept = (self.keep,) if self.keep else ()
        broad = (self.data.rows, self.data.sources, self.asks) if self.data.sources else ()
        return repr((self.name, self.instructions, self.lora, self.training, *late, *kept, *broad))


class BaseRecipe(_Table, frozen=True):
    """Changes of the shipped recipes for a base: ``recipes/bases/BASE.toml``."""

    description: str
    """Description of a pack with all shipped skills on this base."""
    lora: dict[str, Any] = {}
    """Fields of `Lora` that replace those of a recipe."""
    training: dict[str, Any] = {}
    """Fields of `Training` that replace those of a recipe."""


RECIPES = Path(__file__).parent / "recipes"


def shipped() -> list[str]:
    """Names of the recipes that ship with Loramix."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: a TOML file, or the name of a recipe that ships with Loramix.

    A recipe with ``extends = "NAME"`` takes missing settings from a shipped recipe, and uses the instructions and
    asks of both.

    Raises:
        NotFound: the recipe does not exist.
        InvalidRecipe: not TOML, an unknown key, a wrong type or value.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = RECIPES / f"{name_or_path}.toml"
    if not is_safe_name(path.stem) or not path.is_file():
        raise NotFound(f"no recipe {name_or_path!r}: give a TOML file, or one of {', '.join(shipped())}.")
    recipe = _recipe(path)
    if not is_safe_name(recipe.name):
        raise InvalidRecipe(f"{path}: name {recipe.name!r} needs 1 to 64 of a-z, 0-9, '_', '.', '-'.")
    bad = [t for group in recipe.instructions.values() for t in group if t.count("{input}") != 1]
    if bad or not any(recipe.instructions.values()):
        raise InvalidRecipe(
            f"{path}: each instruction needs '{{input}}' once; found {bad[:1] or 'no instructions'}."
        )
    if any(bool(source.file) == bool(source.made) for source in recipe.data.sources):
        raise InvalidRecipe(f"{path}: a source needs either 'file' or 'made'; set one of them.")
    groups = recipe.instructions.keys() | recipe.asks.keys()
    if unknown := {group for source in recipe.data.sources for group in source.instructions} - groups:
        raise InvalidRecipe(
            f"{path}: a source names the instructions {min(unknown)!r}; the recipe has no such group; add it."
        )
    return recipe


def _recipe(path: Path) -> Recipe:
    """Decode a recipe, on top of the shipped one that it extends, if any."""
    own: dict[str, Any] = decode_toml(path, dict)
    extended = own.pop("extends", None)
    if extended is not None:
        if extended not in shipped():
            raise InvalidRecipe(f"{path}: extends {extended!r}; name one of {', '.join(shipped())}.")
        whole: dict[str, Any] = decode_toml(RECIPES / f"{extended}.toml", dict)
        for key, value in own.items():
            known = whole.get(key)
            whole[key] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
        own = whole
    try:
        return msgspec.convert(own, Recipe)
    except msgspec.ValidationError as error:
        raise InvalidRecipe(f"{path}: {error}; fix that line and run the command again.") from None


def decode_toml(path: Path, kind: type[T]) -> T:
    """Read a TOML file as a type.

    Raises:
        InvalidRecipe: not readable, not TOML, or not of that type.
    """
    try:
        return msgspec.toml.decode(read_text(path, InvalidRecipe), type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, OSError) as error:
        raise InvalidRecipe(f"{path}: {error}; fix that line and run the command again.") from None


def base_recipe(base: str) -> BaseRecipe | None:
    """Return the shipped changes for a base, named with or without a quantization; None if there are none.

    Raises:
        InvalidRecipe: not TOML, an unknown key, a wrong type.
    """
    name = base.partition(":")[0]
    path = RECIPES / "bases" / f"{name}.toml"
    if not is_safe_name(name) or not path.is_file():
        return None
    return decode_toml(path, BaseRecipe)


def recipe_for(name_or_path: str, base: str) -> Recipe:
    """Load a recipe with the changes for a base; a user's own file stays unchanged.

    Args:
        name_or_path: see `load_recipe`.
        base: name or path of the base.

    Raises:
        NotFound, InvalidRecipe: see `load_recipe`.
    """
    recipe = load_recipe(name_or_path)
    return recipe if Path(name_or_path).is_file() else changed_for(recipe, base)


def changed_for(recipe: Recipe, base: str) -> Recipe:
    """Apply the shipped changes for a base to a recipe.

    Raises:
        InvalidRecipe: the changes do not match the recipe.
    """
    if (change := base_recipe(base)) is None:
        return recipe
    tables = msgspec.to_builtins(recipe)
    tables["lora"] |= change.lora
    tables["training"] |= change.training
    try:
        return msgspec.convert(tables, Recipe)
    except msgspec.ValidationError as error:
        raise InvalidRecipe(f"the recipe of base {base}: {error}; fix that line.") from None


def recipe_beside(data_dir: Path, name: str) -> Recipe:
    """Load the recipe ``NAME.toml`` from the data directory, otherwise the shipped recipe of that name.

    Raises:
        NotFound, InvalidRecipe: see `load_recipe`.
    """
    beside = data_dir / f"{name}.toml"
    return load_recipe(str(beside) if beside.is_file() else name)
