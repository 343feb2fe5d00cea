"""Adding a skill to a pack: adapter, check, gate and files change together.

The gate is extended with the pack's feature bank, so the other skills' data are not needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from loramix.convert.adapter import convert_adapter
from loramix.errors import InvalidArtifact, NotFound, UsageError
from loramix.formats.sniff import HEAD, sniff
from loramix.formats.validate import check_adapter, read_adapter_bytes, read_base
from loramix.models import bases
from loramix.pack.edit import Change, add_skill, check_skill_name
from loramix.pack.own import Target
from loramix.pack.pack import Pack
from loramix.runtime.children import adapter_effect
from loramix.train.card import write_card
from loramix.train.data import Row
from loramix.train.gate_update import gate_with
from loramix.train.label_skill import calibrated
from loramix.train.lora import Progress, train_skill
from loramix.train.recipe import Recipe


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
        target: the pack; a new one is created at the end, with the skill in it.
        recipe: recipe of the skill.
        rows: data of the skill; with ``adapter``, only examples for the gate.
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
        raise UsageError(
            f"pack {pack.name} already has a skill {name}; remove it with 'loramix skill remove', or use --replace."
        )
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
        _write_gguf(adapter, base, pack, converted)
        content = read_adapter_bytes(converted)
        check_adapter(content, read_base(base)[1], str(adapter), base_sha256=pack.manifest.base.sha256)
        say(f"the adapter changes the base's logits by up to {adapter_effect(base, converted):.2f}")
        labels = calibrated(recipe, rows, base, converted)
    gate = gate_with(pack, recipe, rows, base, out, say)
    with target.changing() as directory:
        change = add_skill(
            directory,
            name,
            content,
            description=recipe.description,
            max_tokens=recipe.max_tokens,
            example=recipe.example or None,
            instruction=recipe.canonical,
            card=write_card(recipe, pack.manifest.base.name, numbers),
            labels=labels,
            replace_existing=replace_existing,
            gate=gate,
        )
    return change._replace(pack=Pack.load(target.directory))


def _write_gguf(adapter: Path, base: Path, pack: Pack, out: Path) -> None:
    """Write an adapter as a GGUF LoRA for a pack's base; a GGUF file is copied."""
    if adapter.is_dir():
        reference = pack.manifest.base
        convert_adapter(adapter, base, out, base_name=reference.name, base_sha256=reference.sha256)
    elif adapter.is_file():
        out.write_bytes(adapter.read_bytes())
    else:
        raise NotFound(f"no adapter at {adapter}; give a PEFT or mlx-lm directory, or a GGUF LoRA file.")


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
