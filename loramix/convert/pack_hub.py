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
from loramix.pack.pack import MAX_FEATURES_BYTES, Pack, is_shipped_name
from loramix.paths import data_dir, safe_join, safe_name, write_text

MAX_CARD_BYTES = 2**20
ORIGIN = ".hub.json"
"""File with the repository that a pack was pulled from; a pull from any other repository must not replace it."""


def pull_pack(text: str, *, skill: str = "", name: str = "", into: str = "", revision: str = "") -> Change:
    """Pull a pack, or one skill of it, into the directory of packs that are found by name.

    Args:
        text: ``OWNER/REPO[@REVISION]``.
        skill: pull only this skill, without a gate.
        name: name of the pack on this machine; by default its name in the repository.
        into: with ``skill``, the pack to add it to; a read-only pack is copied first.
        revision: branch, tag or commit; by default main.

    Returns:
        The pack, and a message for the user.

    Raises:
        NotFound: no such repository or revision, or no pack in it.
        InvalidArtifact, WrongBase: a file of the pack is invalid; packs on this machine stay unchanged.
        UsageError: another pack has the name.
        UnknownSkill: the pack has no such skill.
    """
    place = _repository(text, revision)
    if into and not skill:
        raise UsageError("--into needs one skill; name it with --skill.")
    found = hub.list_files(place)
    place = place._replace(revision=found.commit)  # all further files are of this commit
    if MANIFEST not in found.files:
        raise NotFound(
            f"{place.repository} has no {MANIFEST}, so it is not a pack; import an adapter with "
            "'loramix skill import'."
        )
    _bounded(found.files, MANIFEST, MAX_MANIFEST_BYTES, place)
    directory = data_dir() / "packs"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".pull-") as temporary:
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
        message += f"; its base is not on this machine: 'loramix pull {pack.manifest.base.name}'"
    return Change(pack, message + ".")


def push_pack(pack: Pack, text: str, *, skill: str = "", private: bool = False) -> str:
    """Push a pack, or one skill of it, in one commit.

    Args:
        pack: the pack; checked before anything is sent.
        text: ``OWNER/REPO``; created if it does not exist.
        skill: push only this skill, as a pack of one skill and as a PEFT adapter.
        private: make the repository private.

    Returns:
        The commit's URL.

    Raises:
        InvalidArtifact, WrongBase: a file of the pack is invalid; nothing is sent.
        NotFound: there is no token, no such owner, or the base is not on this machine.
        UsageError: others cannot get the base, or the repository has other content.
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
            raise NotFound(f"pushing to the hub needs a token: {hub_errors.log_in()}.")
        contents["README.md"] = write_card(manifest, place.repository, base_model, card).encode()
        api = HfApi()
        api.create_repo(place.repository, private=private or None, exist_ok=True)
        there = hub.list_files(place)
        if private and not there.private:
            raise UsageError(
                f"{place.repository} already exists and is public; make it private, or name another repository."
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
        except ValueError as error:  # errors in the card's front matter, or in the upload of large files
            if hasattr(error, "response"):
                raise
            raise InvalidArtifact(f"the hub rejects the pack: {str(error).splitlines()[0]}") from None
    return str(done.commit_url)


def _repository(text: str, revision: str) -> Place:
    place = hub.parse(text)
    if place is None or place.file:
        raise UsageError(f"{text[:80]!r} is not a repository on the hub; give OWNER/REPO.")
    return place._replace(revision=revision) if revision else place


def _target(name: str, place: Place) -> Path:
    """Return the directory for a pulled pack; reject a name that a pack of another origin has."""
    target = data_dir() / "packs" / safe_name(name, "pack")
    if is_shipped_name(name):
        raise UsageError(
            f"{name} is a pack that ships with Loramix; give the pulled pack another name with --name."
        )
    if target.exists():
        try:
            known = json.loads((target / ORIGIN).read_text()).get("repository")
        except (OSError, ValueError, AttributeError):
            known = None
        if known != place.repository:
            raise UsageError(
                f"a pack {name} from {known or 'this machine'} already exists; give another name with --name."
            )
    return target


def _fetch_files(manifest: Manifest, files: Mapping[str, Remote], place: Place, staging: Path) -> None:
    """Download the files of a manifest into ``staging``; check sizes and digests on the hub first."""
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
                f"{place.repository} lacks {file}, which its {MANIFEST} names; report this to its author."
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
            f"{file} of {place.repository} has {files[file].size} bytes, the limit is {limit}; it was not downloaded."
        )


def _add(target: Target, source: Pack) -> Change:
    base = target.pack.manifest.base
    if base.sha256 != source.manifest.base.sha256:
        raise WrongBase(
            f"the skill is for base {source.manifest.base.name} ({source.manifest.base.sha256[:12]}), "
            f"pack {target.pack.name} for {base.name} ({base.sha256[:12]}); pull it as a separate pack, without --into."
        )
    (entry,) = source.skills
    card = entry.card and safe_join(source.directory, entry.card).read_text("utf-8", "replace")
    with target.changing() as directory:
        change = add_skill(
            directory,
            entry.name,
            source.adapter_bytes(entry.name),
            description=entry.description,
            max_tokens=entry.max_tokens,
            example=entry.example,
            instruction=entry.instruction,
            labels=entry.closed_labels,
            card=card,
        )
    note = f" {target.note[:1].upper()}{target.note[1:]}." if target.note else ""
    return Change(Pack.load(target.directory), change.message + note)


def _base_model(name: str) -> str:
    """Return the base's repository on the hub."""
    if name in BASES:
        return BASES[name].origin
    if "/" in name and not Path(name).exists() and (place := hub.parse(name)):
        return place.repository
    raise UsageError(
        f"the pack's base is {name}, a file of this machine that others cannot get: put it on the hub, and name it in "
        f"{MANIFEST} as OWNER/REPO:FILE."
    )


def _contents(pack: Pack, manifest: Manifest) -> dict[str, bytes]:
    """Read the files of a pack by name, with their digests checked."""
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
    """Read the manifest in the repository; reject a repository of another pack."""
    if MANIFEST not in there.files:
        return None
    at = place._replace(file=MANIFEST, revision=there.commit)
    old = decode_manifest(hub.fetch(at).path.read_bytes(), Path(place.repository))
    if skill and [entry.name for entry in old.skills] != [skill]:
        raise UsageError(
            f"{place.repository} has pack {old.name} with other skills, which pushing only {skill} would remove; "
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
