"""A training recipe: one TOML file says what a skill is, how to ask for it and how to train it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from loramix.defaults import MAX_RANK, RANK
from loramix.errors import InvalidRecipe, NotFound
from loramix.formats.textfile import read_text
from loramix.paths import is_safe_name

T = TypeVar("T")
Positive = Annotated[int, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
MeasureName = Literal[
    "accuracy", "chrf", "entity_f1", "exact", "first_word", "frame_intent", "macro_f1",
    "positive_f1", "rouge_l", "slot_f1", "slot_recall", "valid_json",
]  # fmt: skip


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class DataSource(_Table, frozen=True):
    """One of several files that a recipe trains on, and its share of a sample."""

    file: str = ""
    """Path below the data directory, without ``.jsonl.gz``."""
    made: Literal[
        "", "emotion", "sentiment", "shell", "spam", "sql", "summarize", "title", "translate_fr"
    ] = ""
    """Rows made by rule in the place of a file (see `loramix.train.made_rows`)."""
    take: tuple[str, ...] = ()
    """Values of the rows' ``source`` that are used; by default all."""
    weight: Annotated[float, Meta(gt=0)] = 1.0
    """Share of a sample, relative to the other sources; a source never gives a row twice in one sample."""
    instructions: tuple[str, ...] = ("any",)
    """Groups of the recipe's instructions and asks that fit these rows."""
    target: str | None = None
    """An answer for all rows in place of their own: texts of another task that all belong to one class."""
    rename: dict[str, str] = {}
    """Entity types to replace in the targets, old to new."""
    target_rates: dict[str, Fraction] = {}
    """Share of the rows with a target that is kept, for classes that would drown the others; by default all."""
    one_sentence: bool = False
    """Whether only training rows are used whose target is one sentence."""
    schema_forms: bool = False
    """Whether each row's database schema is written in a form drawn at random (see `loramix.train.schema_forms`)."""


class Source(_Table, frozen=True):
    """Where a user gets the data: a hub dataset id, or how to make the file."""

    license: str
    how: str
    hub: str | None = None
    rows: Positive = 12000
    """Rows of a sample over several sources."""
    sources: tuple[DataSource, ...] = ()
    """Files of a data directory, sampled by weight; none: the skill's one file."""


class Lora(_Table, frozen=True):
    """Shape of the adapter; names as in PEFT's LoraConfig."""

    r: Annotated[int, Meta(ge=1, le=MAX_RANK)] = RANK
    lora_alpha: Annotated[float, Meta(gt=0)] = 32
    lora_dropout: Fraction = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    skip_lowest: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of the base's layers, from the bottom, that get no matrices: no gradient passes through them,
    so that a third of the layers left out saves a sixth of the work and a third of the file."""

    def layers(self, count: int) -> list[int]:
        """Which of the base's ``count`` layers are adapted."""
        return list(range(int(self.skip_lowest * count), count))


class Training(_Table, frozen=True):
    """The optimizer's settings."""

    epochs: Annotated[float, Meta(gt=0)] = 1.0
    """Passes over the training rows."""
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    """Highest rate, reached after the warm-up; cosine decay to a tenth of it."""
    warmup: Fraction = 0.05
    """Share of a round's steps."""
    rounds: Positive | Annotated[tuple[Positive, ...], Meta(min_length=1)] = 1
    """Parts of the run, each with its own warm-up and decay and an optimizer that remembers nothing of the one
    before: warm restarts (arXiv 1608.03983); so many equal ones, or their lengths in proportion."""
    batch_size: Positive = 16
    """Examples in an optimizer step."""
    micro_batch_tokens: Positive = 2048
    """Most tokens, padding included, in one forward pass; bounds memory."""
    max_length: Positive = 1024
    """Longest example in tokens: a long input is cut in its middle; a row whose answer does not fit is left out."""
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    gradient_clip: Annotated[float, Meta(gt=0)] = 1.0
    evaluate_every: Positive = 100
    """Optimizer steps between measurements on dev."""
    save_every: Positive = 50
    """Optimizer steps between checkpoints."""
    dev_rows: Positive = 256
    """Rows of dev that are measured."""
    seed: int = 0

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of the rounds, in proportion."""
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
    """Short requests without the text, by group like the instructions; `loramix.train.frames` puts them
    before or behind a text."""
    any_text: bool = False
    """Whether the instruction makes sense on any text, as "summarize" does and "write the SQL" does not."""
    labels: list[str] = []
    """Allowed answers, where the task is a classification."""
    max_tokens: Positive = 64
    """Longest answer of the skill at run time."""
    example: str = ""
    """A prompt that shows the skill."""
    keep: MeasureName | None = None
    """Train only on rows whose own target is perfect by this measure, e.g. sentences that say all facts."""
    activation: Literal["always", "answer"] = "always"
    """Where the adapter acts: on all tokens, or from the answer's header on (see `loramix.train.activated_lora`)."""
    lora: Lora = Lora()
    training: Training = Training()

    def fingerprint(self) -> str:
        """What decides a training's result: a new description or example changes no adapter."""
        late = ("answer",) if self.activation == "answer" else ()
        kept = (self.keep,) if self.keep else ()
        broad = (self.data.rows, self.data.sources, self.asks) if self.data.sources else ()
        return repr((self.name, self.instructions, self.lora, self.training, *late, *kept, *broad))


class BaseRecipe(_Table, frozen=True):
    """How the shipped recipes change for a base: ``recipes/bases/BASE.toml``."""

    description: str
    """Of a pack of all the shipped skills on it."""
    lora: dict[str, Any] = {}
    """Fields of `Lora` that replace a recipe's own."""
    training: dict[str, Any] = {}
    """Fields of `Training` that do."""


RECIPES = Path(__file__).parent / "recipes"


def shipped() -> list[str]:
    """Names of the recipes that ship with Loramix."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: a TOML file, or the name of a recipe that ships with Loramix.

    A recipe with ``extends = "NAME"`` takes what it does not say itself from a shipped one; instructions and
    asks of both are used.

    Raises:
        NotFound: there is no such recipe.
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
        raise InvalidRecipe(f"{path}: a source needs either 'file' or 'made'; give one.")
    groups = recipe.instructions.keys() | recipe.asks.keys()
    unknown = {group for source in recipe.data.sources for group in source.instructions} - groups
    if unknown:
        raise InvalidRecipe(f"{path}: a source names the instructions {min(unknown)!r}; the recipe has none.")
    return recipe


def _recipe(path: Path) -> Recipe:
    """Decode a recipe, on top of the shipped one that it extends, if any."""
    own: dict[str, Any] = _decoded(path, dict)
    extended = own.pop("extends", None)
    if extended is not None:
        if extended not in shipped():
            raise InvalidRecipe(f"{path}: extends {extended!r}; name one of {', '.join(shipped())}.")
        whole: dict[str, Any] = _decoded(RECIPES / f"{extended}.toml", dict)
        for key, value in own.items():
            known = whole.get(key)
            whole[key] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
        own = whole
    try:
        return msgspec.convert(own, Recipe)
    except msgspec.ValidationError as error:
        raise InvalidRecipe(f"{path}: {error}; correct that line and run the command again.") from None


def _decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.toml.decode(read_text(path, InvalidRecipe), type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidRecipe(f"{path}: {error}; correct that line and run the command again.") from None


def base_recipe(base: str) -> BaseRecipe | None:
    """What ships for a base, named with or without a quantization; None where its recipes stay as they are.

    Raises:
        InvalidRecipe: not TOML, an unknown key, a wrong type.
    """
    name = base.partition(":")[0]
    path = RECIPES / "bases" / f"{name}.toml"
    if not is_safe_name(name) or not path.is_file():
        return None
    return _decoded(path, BaseRecipe)


def recipe_for(name_or_path: str, base: str) -> Recipe:
    """A recipe as it is trained on a base; a file of the user's own stays as it is.

    Args:
        name_or_path: see `load_recipe`.
        base: name or path.

    Raises:
        NotFound, InvalidRecipe: see `load_recipe`.
    """
    recipe = load_recipe(name_or_path)
    return recipe if Path(name_or_path).is_file() else changed_for(recipe, base)


def changed_for(recipe: Recipe, base: str) -> Recipe:
    """A recipe with what ships for a base in the place of its own.

    Raises:
        InvalidRecipe: what ships does not fit a recipe.
    """
    change = base_recipe(base)
    if change is None:
        return recipe
    tables = msgspec.to_builtins(recipe)
    tables["lora"] |= change.lora
    tables["training"] |= change.training
    try:
        return msgspec.convert(tables, Recipe)
    except msgspec.ValidationError as error:
        raise InvalidRecipe(f"the recipe of base {base}: {error}; fix that line.") from None


def recipe_beside(data_dir: Path, name: str) -> Recipe:
    """The recipe ``NAME.toml`` beside a skill's data, else the one that ships with Loramix.

    Raises:
        NotFound, InvalidRecipe: see `load_recipe`.
    """
    beside = data_dir / f"{name}.toml"
    return load_recipe(str(beside) if beside.is_file() else name)
