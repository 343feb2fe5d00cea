"""Downloads files of the Hugging Face hub into the hub's cache: resumes interrupted downloads and checks digests.

Independent of bases and packs. Needs the hub's client, which comes with the extra [hub].
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loramix.errors import Busy, InvalidArtifact, LoramixError
from loramix.models.hub_errors import asking
from loramix.models.hub_place import Place as Place
from loramix.models.hub_place import parse as parse
from loramix.paths import need_space, sha256_file, sync_directory

SPARE_BYTES = 64 * 2**20
"""Free disk space that must remain after a download."""
PATIENCE_SECONDS = 4.0
"""How long a hub may take to answer where there is another source."""
_ETAG = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


class Listing(NamedTuple):
    """A repository as it is at one commit."""

    commit: str
    """40 hex digits."""
    files: dict[str, Remote]
    architecture: str
    """What the hub read from a GGUF there, or an empty text."""
    private: bool


class Remote(NamedTuple):
    """A file as the hub lists it."""

    size: int
    sha256: str
    """Empty for small files, which git keeps under a digest of its own."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is here."""

    path: Path
    commit: str
    """What the revision stood for, 40 hex digits; empty where the hub could not be asked."""


def list_files(place: Place) -> Listing:
    """Files of a repository.

    Args:
        place: its ``file`` does not matter.

    Raises:
        NotFound: no such repository or revision, no access, or no hub to be reached.
    """
    with asking(place):
        from huggingface_hub import HfApi

        info = HfApi().model_info(place.repository, revision=place.revision, files_metadata=True)
    files = {
        sibling.rfilename: Remote(sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else "")
        for sibling in info.siblings or []
    }
    return Listing(str(info.sha), files, str((info.gguf or {}).get("architecture", "")), bool(info.private))


def fetch(
    place: Place, *, sha256: str = "", known: str = "", check: Callable[[Path], object] | None = None
) -> Fetched:
    """Fetch one file into the hub's cache; a cut download goes on where it was when it is fetched again.

    Args:
        place: what to fetch.
        sha256: what it must be; by default what the hub says it is.
        known: what it was when it was fetched before; where the hub has another content now, it is refused.
        check: raises on content that must not be kept; it sees the file before the cache does.

    Raises:
        NotFound: no such repository, revision or file, no access, or no hub to be reached.
        InvalidArtifact: what came is not what was asked for; it is not kept.
        NoSpace: the disk is too small; nothing half-written stays.
        Busy: another process fetches the same file.
    """
    with asking(place):
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
        from huggingface_hub.file_download import repo_folder_name

        if len(place.revision) == 40 and (here := _cached(place)):
            return Fetched(here, place.revision)
        url = hf_hub_url(place.repository, place.file, revision=place.revision)
        try:
            remote = get_hf_file_metadata(url)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not hasattr(error, "response") and (here := _cached(place)):
                return Fetched(here, "")
            raise
        if not _ETAG.fullmatch(remote.etag or "") or not _ETAG.fullmatch(remote.commit_hash or ""):
            raise InvalidArtifact(
                f"the hub gives no digest for {place}, so it cannot be checked; not fetched."
            )
        if sha256 and len(remote.etag) == 64 and remote.etag != sha256:
            raise InvalidArtifact(
                f"the hub has {place} with sha256 {remote.etag[:12]}, needs {sha256[:12]}; not fetched."
            )
        if known and not sha256 and len(remote.etag) == 64 and remote.etag != known:
            raise InvalidArtifact(changed(place, known, remote.etag))
        folder = repo_folder_name(repo_id=place.repository, repo_type="model")
        cache = Path(constants.HF_HUB_CACHE)
        blob = cache / folder / "blobs" / remote.etag
        if not blob.exists():
            with _alone(cache / ".locks" / folder / f"{remote.etag}.lock", place):
                _transfer(place, url, remote, blob, sha256, check)
        # the content is there: the client only writes its own book-keeping, a link under the commit
        path = hf_hub_download(place.repository, place.file, revision=remote.commit_hash)
        return Fetched(Path(path), remote.commit_hash)


def unavailable(place: Place) -> str:
    """Why a file of the hub cannot be had now, as the beginning of a sentence; empty where it can.

    Args:
        place: it is asked for, not fetched; what is in the hub's cache needs no asking.
    """
    try:
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url
    except ImportError:
        return "the hub's client is not installed"
    try:
        if not _cached(place):
            url = hf_hub_url(place.repository, place.file, revision=place.revision)
            get_hf_file_metadata(url, timeout=PATIENCE_SECONDS)
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except errors.HfHubHTTPError as error:
        return f"the hub refuses {place} (HTTP {error.response.status_code})"
    except errors.HTTPError:
        return "the hub cannot be reached"
    except errors.FileMetadataError:
        return "what answers for the hub is no hub"
    return ""


def changed(place: Place, known: str, found: str) -> str:
    """What to say where a name stands for another content than before."""
    return (
        f"{place} was pulled before with sha256 {known[:12]} and is {found[:12]} now; not taken. To keep the old one "
        f"do nothing; to take the new one, pull it with --sha256 {found}."
    )


def _cached(place: Place) -> Path | None:
    """The file where the hub's cache has it already."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.repository, place.file, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


def _transfer(
    place: Place,
    url: str,
    remote: Any,
    blob: Path,
    sha256: str,
    check: Callable[[Path], object] | None,
) -> None:
    """Download into a file beside ``blob`` that outlives a cut, check it, and move it there."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob.parent.mkdir(parents=True, exist_ok=True)
    # the client's own partial files die with the process; the digest in the name keeps ours from mixing contents
    partial = blob.with_name(f"{blob.name}.loramix.incomplete")
    held = partial.stat().st_size if partial.exists() else 0
    if remote.size is not None:
        if held > remote.size:
            partial.unlink()
            held = 0
        need_room(blob, remote.size - held, place)
    try:
        # plain HTTP, with or without the client's optional transfer library: that one keeps nothing of a cut
        with partial.open("ab") as out:
            http_get(
                url,
                out,
                resume_size=held,
                headers=build_hf_headers(headers={"Accept-Encoding": "identity"}),
                expected_size=remote.size,
                displayed_filename=place.file,
            )
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        if not hasattr(error, "response"):  # a full disk, or more than the hub promised
            partial.unlink(missing_ok=True)
        raise
    try:
        _check_digest(partial, place, remote.etag, sha256)
        if check is not None:
            check(partial)
    except LoramixError:
        partial.unlink()
        raise
    partial.replace(blob)
    sync_directory(blob.parent)


def _check_digest(path: Path, place: Place, etag: str, sha256: str) -> None:
    if sha256 or len(etag) == 64:
        found, wanted, kind = sha256_file(path), sha256 or etag, "sha256"
    else:  # git's own digest, of small files
        content = path.read_bytes()
        found, wanted, kind = (
            hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            etag,
            "git digest",
        )
    if found != wanted:
        raise InvalidArtifact(
            f"{place} came with {kind} {found[:12]}, needs {wanted[:12]}; not kept. Fetch it again; if it comes so "
            "again, the hub or what is between has other content."
        )


def need_room(path: Path, size_bytes: int, place: Place) -> None:
    """`need_space` for what comes from a place."""
    fix = "make room, or set HF_HOME (files of the hub) or LORAMIX_DATA (packs) to another disk."
    need_space(path, size_bytes, str(place), spare_bytes=SPARE_BYTES, fix=fix)


@contextmanager
def _alone(lock: Path, place: Place) -> Iterator[None]:
    """The lock that the hub's client takes for the same file."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0.5):
            yield
    except Timeout:
        raise Busy(f"another process is fetching {place}; run the command again after it.") from None
