"""Commands on packs: ``loramix pack list|show|check|new|copy|add|remove|pull|push``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from loramix.commands.fetch_base import fetch_base
from loramix.commands.options import PATH
from loramix.commands.skill import TO, remove, say_how_to_use, target_of
from loramix.defaults import DEFAULT_PACK

if TYPE_CHECKING:
    from loramix.pack.manifest import Labels
    from loramix.train.recipe import Recipe


@click.group()
def pack() -> None:
    """List, inspect, create and change packs."""


@pack.command("list")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def pack_list(as_json: bool) -> None:
    """List the packs that can be opened by name."""
    from loramix.pack.pack import list_packs

    found = list_packs()
    if as_json:
        rows = [
            {
                "name": row.name,
                "skills": [skill.name for skill in row.pack.skills] if row.pack else [],
                "error": str(row.error) if row.error else None,
            }
            for row in found
        ]
        click.echo(json.dumps(rows))
        return
    for row in found:
        what = ", ".join(skill.name for skill in row.pack.skills) if row.pack else f"unusable: {row.error}"
        click.echo(f"{row.name}: {what}")


@pack.command("show")
@click.argument("name", default=DEFAULT_PACK)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def pack_show(name: str, as_json: bool) -> None:
    """Show the skills, base and gate of the pack NAME."""
    import msgspec

    from loramix.pack.pack import Pack

    found = Pack.load(name)
    if as_json:
        click.echo(msgspec.json.encode(found.manifest).decode())
        return
    manifest = found.manifest
    click.echo(f"{manifest.name}: {manifest.description}")
    click.echo(f"base {manifest.base.name} (sha256 {manifest.base.sha256[:12]}), licence {manifest.license}")
    for skill in found.skills:
        click.echo(f"  {skill.name}: {skill.description}")
        if skill.example:
            click.echo(f"      e.g. {skill.example}")
    click.echo("gate: " + (manifest.gate.file if manifest.gate else "none; run 'loramix train gate'"))


@pack.command("check")
@click.argument("name", default=DEFAULT_PACK)
def pack_check(name: str) -> None:
    """Check every file of the pack NAME, and its adapters against the base if that is on this machine."""
    from loramix.diagnose.wording import counted
    from loramix.models import bases
    from loramix.pack.pack import Pack

    found = Pack.load(name)
    base = bases.find(found.manifest.base.name)
    for note in found.check(base):
        click.echo(note, err=True)
    missing = "" if base else f" (its base is not here: 'loramix pull {found.manifest.base.name}')"
    click.echo(f"{found.name}: {counted(len(found.skills), 'skill')}, all files as they should be{missing}")


@pack.command("new")
@click.argument("directory", type=PATH)
@click.option("--base", default=DEFAULT_PACK, show_default=True, help="Base: name or GGUF.")
@click.option("--description", default="", help="One line.")
@click.option(
    "--license", "license_", default="Apache-2.0", show_default=True, help="Licence of the adapters."
)
def pack_new(directory: Path, base: str, description: str, license_: str) -> None:
    """Create an empty pack in DIRECTORY, with the directory's name."""
    from loramix.models import bases
    from loramix.pack.edit import new_pack
    from loramix.templates.base_template import check_template

    fetch_base(base)
    path = bases.resolve(base)
    check_template(path)
    new_pack(directory, base, bases.digest(path), description=description, license=license_)
    click.echo(str(directory))


@pack.command("copy")
@click.argument("name")
@click.argument("directory", type=PATH)
def pack_copy(name: str, directory: Path) -> None:
    """Copy the pack NAME to DIRECTORY, to change it there; unchanged files share their disk space."""
    from loramix.pack.own import copy_pack
    from loramix.pack.pack import Pack

    copy_pack(Pack.load(name), directory)
    click.echo(str(directory))


@pack.command("add")
@click.argument("name", metavar="PACK")
@click.argument("skill")
@click.argument("adapter", type=PATH)
@click.option("--recipe", help="Recipe (name or file) for description, length, instruction and example.")
@click.option(
    "--data", type=PATH, help="With --recipe: data directory, to calibrate a label skill on its dev rows."
)
@click.option("--description", help="One line; by default the recipe's.")
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Maximum tokens of an answer; by default the recipe's."
)
@click.option(
    "--instruction", help="How the skill is asked, with '{input}'; by default the recipe's first one."
)
@click.option("--card", type=PATH, help="Markdown file on data, results and limits.")
@click.option(
    "--scale",
    type=click.FloatRange(0, 4, min_open=True),
    default=1.0,
    help="Strength of the adapter; below 1 the answers keep more of the base's.  [default: 1]",
)
@click.option("--replace", is_flag=True, help="Replace a skill of that name.")
@click.option("--keep-gate", is_flag=True, help="With --replace: keep the gate as it is.")
@TO
def pack_add(
    name: str,
    skill: str,
    adapter: Path,
    recipe: str | None,
    data: Path | None,
    description: str | None,
    max_tokens: int | None,
    instruction: str | None,
    card: Path | None,
    scale: float,
    replace: bool,
    keep_gate: bool,
    to: str,
) -> None:
    """Add the GGUF LoRA file ADAPTER to PACK (name or directory) as SKILL.

    A pack that ships with Loramix is not changed: the skill is added to a copy of it, my-PACK.
    """
    from loramix.errors import NotFound, UsageError
    from loramix.formats.textfile import read_text
    from loramix.models import bases
    from loramix.pack.edit import add_skill
    from loramix.pack.manifest import usable_instruction

    example, loaded = None, None
    if recipe:
        from loramix.train.recipe import load_recipe

        loaded = load_recipe(recipe)
        description, max_tokens = description or loaded.description, max_tokens or loaded.max_tokens
        example, instruction = loaded.example or None, instruction or loaded.canonical
    elif data is not None:
        raise UsageError("--data needs --recipe, which says how the skill is asked.")
    if not description or not max_tokens:
        raise UsageError("a skill needs --recipe, or --description and --max-tokens.")
    if instruction is not None and usable_instruction(instruction) is None:
        raise UsageError(
            "--instruction needs '{input}' once, where the text stands, and at most 2000 characters."
        )
    if card is not None and not card.is_file():
        raise NotFound(f"no card at {card}; give a Markdown file.")
    target = target_of(name, to, make=False)
    base = bases.find(target.pack.manifest.base.name)
    if base is not None:
        _fits(adapter, base)
    with _scaled(adapter, scale) as file:
        labels = _labels(loaded, data, base, file)
        with target.changing() as directory:
            change = add_skill(
                directory,
                skill,
                file,
                description=description,
                max_tokens=max_tokens,
                example=example,
                instruction=instruction,
                card=read_text(card) if card else None,
                labels=labels,
                replace_existing=replace,
                keep_gate=keep_gate,
            )
    click.echo(change.message)
    say_how_to_use(target)


@contextmanager
def _scaled(adapter: Path, scale: float) -> Iterator[Path]:
    """Write an adapter of another strength, for a while; at scale 1 the file itself serves."""
    from loramix.formats.adapter_file import read_adapter_bytes, with_scale

    if scale == 1:
        yield adapter
        return
    content = with_scale(read_adapter_bytes(adapter), scale)
    with TemporaryDirectory() as place:
        path = Path(place, "adapter.gguf")
        path.write_bytes(content)
        yield path


def _labels(recipe: Recipe | None, data: Path | None, base: Path | None, adapter: Path) -> Labels:
    """Return the labels of a skill that classifies, calibrated if there is data."""
    from loramix.errors import NotFound
    from loramix.pack.manifest import Labels
    from loramix.train.label_skill import calibrated, label_rows

    if recipe is None:
        return Labels()
    if data is None:
        return Labels(tuple(recipe.labels))
    if base is None:
        raise NotFound(
            "the pack's base is not on this machine, and --data needs it; get it with 'loramix pull'."
        )
    return calibrated(recipe, label_rows(recipe, data), base, adapter)


def _fits(adapter: Path, base: Path) -> None:
    """Check that the base can run an adapter, before the pack is changed."""
    from loramix.formats.validate import check_adapter, read_adapter_bytes, read_base
    from loramix.models import bases

    _, shape = read_base(base)
    check_adapter(read_adapter_bytes(adapter), shape, str(adapter), base_sha256=bases.digest(base))


@pack.command("remove")
@click.argument("name", metavar="PACK")
@click.argument("skill")
@TO
def pack_remove(name: str, skill: str, to: str) -> None:
    """Remove SKILL from PACK (name or directory); of a pack that ships with Loramix, from a copy of it."""
    remove(target_of(name, to, make=False), skill)


@pack.command("pull")
@click.argument("repository")
@click.option("--skill", default="", help="Only this skill, without a gate.")
@click.option("--into", default="", help="With --skill: the pack to add it to, or a copy of one that ships.")
@click.option("--name", default="", help="Name of the pack on this machine.")
@click.option("--revision", default="", help="Branch, tag or commit on the hub.")
def pack_pull(repository: str, **options: str) -> None:
    """Pull the pack of OWNER/REPO from the Hugging Face hub, and check it before it is installed."""
    from loramix.convert.pack_hub import pull_pack

    click.echo(pull_pack(repository, **options).message)


@pack.command("push")
@click.argument("name")
@click.argument("repository")
@click.option("--skill", default="", help="Only this skill, for PEFT too.")
@click.option("--private", is_flag=True, help="Create a private repository.")
def pack_push(name: str, repository: str, skill: str, private: bool) -> None:
    """Push the pack NAME to OWNER/REPO on the Hugging Face hub, with a model card."""
    from loramix.convert.pack_hub import push_pack
    from loramix.pack.pack import Pack

    click.echo(push_pack(Pack.load(name), repository, skill=skill, private=private))
