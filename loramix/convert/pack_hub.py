"""Pulls packs and skills from the Hugging Face hub, installs them after validation, and pushes them in one commit.

A repository has the files of a pack directory and a model card; a repository of one skill also has PEFT files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec.structs import replace

from loramix.convert.hub_card import write_card
from loramix.errors import InvalidArtifact, MissingExtra, NotFound, UsageError, WrongBase
from loramix.formats.validate import MAX_ADAPTER_BYTES
from loramix.models import bases, hub, hub_errors
from loramix.models.head_info import MAX_GATE_BYTES
from loramix.models.hub import Place, Remote
from loramix.models.known_bases import BASES
from loramix.pack.edit import Change, add_skill, put_pack
from loramix.pack.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, decode_manifest, write_manifest
from loramix.pack.own import Target, target_of
from loramix.pack.pack import MAX_FEATURES_BYTES, SHIPPED, Pack
from loramix.paths import data_dir, safe_join, safe_name, write_text

MAX_CARD_BYTES = 2**20
ORIGIN = ".hub.json"
"""Says which repository a pack was pulled from; only a pack from there may take its place unasked."""


def pull_pack(text: str, *, skill: str = "", name: str = "", into: str = "", revision: str = "") -> Change:
    """Pull a pack, or one skill of it, to where packs are looked up by name.

    Args:
        text: ``OWNER/REPO[@REVISION]``.
        skill: this one alone, without a gate.
        name: what to call the pack here; by default as it is called there.
        into: with ``skill``, the pack that gets it, or a copy of one that is read-only.
        revision: branch, tag or commit; by default main.

    Returns:
        The pack, and what to tell the user.

    Raises:
        NotFound: no such repository or revision, or no pack in it.
        InvalidArtifact, WrongBase: anything in it that must not be used; what was here stays as it was.
        UsageError: a name that another pack has.
        UnknownSkill: the pack has no such skill.
    """
    place = _repository(text, revision)
    if into and not skill:
        raise UsageError("--into takes one skill; name it with --skill.")
    found = hub.list_files(place)
    place = place._replace(revision=found.commit)  # what comes from now on is of one commit
    if MANIFEST not in found.files:
        raise NotFound(
            f"{place.repository} holds no pack: it has no {MANIFEST}; take an adapter from there with "
            "'loramix skill import'."
        )
    _bounded(found.files, MANIFEST, MAX_MANIFEST_BYTES, place)
    packs = data_dir() / "packs"
    packs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packs, prefix=".pull-") as temporary:
        staging = Path(temporary)
        manifest = decode_manifest(hub.fetch(place._replace(file=MANIFEST)).path.read_bytes(), staging)
        if skill:
            entry = Pack(staging, manifest).skill(skill)
            alone = manifest.name if len(manifest.skills) == 1 else f"{manifest.name}-{skill}"
            manifest = replace(manifest, name=alone, skills=(entry,), gate=None)
        own = target_of(into) if into else None
        target = own.directory if own else _target(name or manifest.name, place)
        manifest = replace(manifest, name=target.name)
        _fetch_files(manifest, found.files, place, staging)
        write_manifest(staging, manifest)
        source = Pack.load(staging)
        source.check(bases.find(manifest.base.name))
        if own:
            return _add(own, source)
        pack = put_pack(target, source)
    origin = {"repository": place.repository, "commit": place.revision}
    write_text(target / ORIGIN, json.dumps(origin) + "\n")
    count = len(pack.skills)
    message = f"pack {pack.name} with {count} skill{'' if count == 1 else 's'} is in {target}"
    if bases.find(pack.manifest.base.name) is None:
        message += f"; its base is not here: 'loramix pull {pack.manifest.base.name}'"
    return Change(pack, message + ".")


def push_pack(pack: Pack, text: str, *, skill: str = "", private: bool = False) -> str:
    """Push a pack, or one skill of it, in one commit.

    Args:
        pack: passes its check before anything is sent.
        text: ``OWNER/REPO``; made where there is none.
        skill: this one alone, as a pack of one skill and as a PEFT adapter.
        private: make the repository private.

    Returns:
        The commit's address.

    Raises:
        InvalidArtifact, WrongBase: a file of the pack that must not be used; nothing is sent.
        NotFound: no token, no such owner, or no base to check against.
        UsageError: a base that others cannot get, or a repository that holds something else.
    """
    place = _repository(text, "")
    base = bases.resolve(pack.manifest.base.name)
    pack.check(base)
    base_model = _base_model(pack.manifest.base.name)
    manifest = pack.manifest
    if skill:
        manifest = replace(manifest, name=skill, skills=(pack.skill(skill),), gate=None)
    contents = _contents(pack, manifest)
    card = ""
    if skill:
        contents |= _peft(pack, skill, base, base_model)
        card = contents.get(manifest.skills[0].card or "", b"").decode("utf-8", "replace")
    with hub_errors.asking(place):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

        if not get_token():
            raise NotFound(f"the hub takes nothing without a token: {hub_errors.LOG_IN}.")
        contents["README.md"] = write_card(manifest, place.repository, base_model, card).encode()
        api = HfApi()
        api.create_repo(place.repository, private=private or None, exist_ok=True)
        there = hub.list_files(place)
        if private and not there.private:
            raise UsageError(
                f"{place.repository} is there already and public; make it private, or name another."
            )
        gone = _files_of(_remote_manifest(there, place, skill)) - contents.keys()
        operations = [CommitOperationDelete(file) for file in sorted(gone & there.files.keys())]
        operations += [CommitOperationAdd(file, content) for file, content in contents.items()]
        try:
            done = api.create_commit(
                place.repository,
                operations,
                commit_message=f"{manifest.name}: {', '.join(entry.name for entry in manifest.skills)}",
                parent_commit=there.commit,
            )
        except ValueError as error:  # the card's front matter, or the store of large files
            if hasattr(error, "response"):
                raise
            raise InvalidArtifact(f"the hub does not take the pack: {str(error).splitlines()[0]}") from None
    return str(done.commit_url)


def _repository(text: str, revision: str) -> Place:
    place = hub.parse(text)
    if place is None or place.file:
        raise UsageError(f"{text[:80]!r} is no repository of the hub; give OWNER/REPO.")
    return place._replace(revision=revision) if revision else place


def _target(name: str, place: Place) -> Path:
    """Return the directory of a pulled pack, which must not replace a pack of another origin."""
    target = data_dir() / "packs" / safe_name(name, "pack")
    if (SHIPPED / name).is_dir():
        raise UsageError(
            f"{name} is a pack of Loramix's own; give the one from the hub another name with --name."
        )
    if target.exists():
        try:
            known = json.loads((target / ORIGIN).read_text()).get("repository")
        except (OSError, ValueError, AttributeError):
            known = None
        if known != place.repository:
            raise UsageError(
                f"there is a pack {name} already, from {known or 'this machine'}; give another name with --name."
            )
    return target


def _fetch_files(manifest: Manifest, files: Mapping[str, Remote], place: Place, staging: Path) -> None:
    """Copy what a manifest names into ``staging``; sizes and digests that the hub tells are compared first."""
    limits, digests = {}, {}
    for skill in manifest.skills:
        limits[skill.file], digests[skill.file] = MAX_ADAPTER_BYTES, skill.sha256
        if skill.card:
            limits[skill.card] = MAX_CARD_BYTES
    if gate := manifest.gate:
        limits[gate.file], digests[gate.file] = MAX_GATE_BYTES, gate.sha256
        if gate.features and gate.features_sha256:
            limits[gate.features], digests[gate.features] = MAX_FEATURES_BYTES, gate.features_sha256
    for file, limit in limits.items():
        if file not in files:
            raise InvalidArtifact(
                f"{place.repository} lacks {file}, which its {MANIFEST} names; tell its author."
            )
        _bounded(files, file, limit, place)
    hub.need_room(staging / MANIFEST, sum(files[file].size for file in limits), place)
    for file in limits:
        fetched = hub.fetch(place._replace(file=file), sha256=digests.get(file, ""))
        copy = safe_join(staging, file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fetched.path, copy)


def _bounded(files: Mapping[str, Remote], file: str, limit: int, place: Place) -> None:
    if files[file].size > limit:
        raise InvalidArtifact(
            f"{file} of {place.repository} has {files[file].size} bytes, at most {limit} can be; not fetched."
        )


def _add(target: Target, source: Pack) -> Change:
    base = target.pack.manifest.base
    if base.sha256 != source.manifest.base.sha256:
        raise WrongBase(
            f"the skill is for base {source.manifest.base.name} ({source.manifest.base.sha256[:12]}), "
            f"pack {target.pack.name} for {base.name} ({base.sha256[:12]}); pull it as a pack of its own."
        )
    (entry,) = source.skills
    with target.changing() as directory:
        change = add_skill(
            directory,
            entry.name,
            source.adapter_bytes(entry.name),
            description=entry.description,
            max_tokens=entry.max_tokens,
            example=entry.example,
            card=safe_join(source.directory, entry.card).read_text("utf-8", "replace")
            if entry.card
            else None,
        )
    message = (
        f"{change.message} {target.note[:1].upper()}{target.note[1:]}." if target.note else change.message
    )
    return Change(Pack.load(target.directory), message)


def _base_model(name: str) -> str:
    """The base's repository on the hub."""
    if name in BASES:
        return BASES[name].origin
    if "/" in name and not Path(name).exists() and (place := hub.parse(name)):
        return place.repository
    raise UsageError(
        f"the pack's base is {name}, a file of this machine that others cannot get: put it on the hub, and name it in "
        f"{MANIFEST} as OWNER/REPO:FILE."
    )


def _contents(pack: Pack, manifest: Manifest) -> dict[str, bytes]:
    """Files of a pack by name, the bytes whose digests were compared."""
    contents = {MANIFEST: msgspec.toml.encode(manifest)}
    for skill in manifest.skills:
        contents[skill.file] = pack.adapter_bytes(skill.name)
        if skill.card:
            contents[skill.card] = safe_join(pack.directory, skill.card).read_bytes()
    if manifest.gate and (gate := pack.gate_path):
        contents[manifest.gate.file] = gate.read_bytes()
        if manifest.gate.features and (features := pack.gate_features()):
            contents[manifest.gate.features] = features
    return contents


def _peft(pack: Pack, skill: str, base: Path, base_model: str) -> dict[str, bytes]:
    from loramix.convert.peft import export_peft
    from loramix.formats.validate import read_base

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "peft"
        try:
            export_peft(pack.adapter_bytes(skill), read_base(base)[1], out, skill)
        except ModuleNotFoundError as error:
            raise MissingExtra(f"a skill for PEFT needs {error.name}: pip install 'loramix[hub]'.") from None
        contents = {path.name: path.read_bytes() for path in out.iterdir()}
    config = json.loads(contents["adapter_config.json"]) | {"base_model_name_or_path": base_model}
    contents["adapter_config.json"] = (json.dumps(config, indent=1) + "\n").encode()
    return contents


def _remote_manifest(there: hub.Listing, place: Place, skill: str) -> Manifest | None:
    """What the repository held before, which must be another state of the same."""
    if MANIFEST not in there.files:
        return None
    at = place._replace(file=MANIFEST, revision=there.commit)
    old = decode_manifest(hub.fetch(at).path.read_bytes(), Path(place.repository))
    if skill and [entry.name for entry in old.skills] != [skill]:
        raise UsageError(
            f"{place.repository} holds pack {old.name} with other skills, which {skill} alone would replace; "
            "name another repository."
        )
    return old


def _files_of(manifest: Manifest | None) -> set[str]:
    if manifest is None:
        return set()
    files = {skill.file for skill in manifest.skills} | {
        skill.card for skill in manifest.skills if skill.card
    }
    if manifest.gate:
        files |= {manifest.gate.file} | ({manifest.gate.features} if manifest.gate.features else set())
    return files
