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
"""Timeout of the hub in seconds if there is another source."""
_ETAG = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


class Listing(NamedTuple):
    """The files of a repository at one commit."""

    commit: str
    """Digest of the commit, 40 hex digits."""
    files: dict[str, Remote]
    architecture: str
    """Architecture of a GGUF in the repository according to the hub; may be empty."""
    private: bool


class Remote(NamedTuple):
    """A file in the hub's listing."""

    size: int
    sha256: str
    """SHA-256; empty for small files, for which the hub has only git's digest."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A downloaded file."""

    path: Path
    commit: str
    """Commit of the revision, 40 hex digits; empty if the hub could not be reached."""


def list_files(place: Place) -> Listing:
    """List the files of a repository.

    Args:
        place: the repository and revision; ``file`` is ignored.

    Raises:
        NotFound: no such repository or revision, no access, or the hub cannot be reached.
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
    """Download one file into the hub's cache; resumes an interrupted download.

    Args:
        place: the file to download.
        sha256: expected digest; by default the hub's.
        known: digest of an earlier download; other content on the hub is rejected.
        check: callback that validates the file before it enters the cache, and raises to reject it.

    Raises:
        NotFound: no such repository, revision or file, no access, or the hub cannot be reached.
        InvalidArtifact: the content is not the expected one; it is discarded.
        NoSpace: the disk has too little free space; partial files are deleted.
        Busy: another process is downloading the same file.
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
                f"the hub has no digest for {place}, so it cannot be checked; it was not downloaded."
            )
        if sha256 and len(remote.etag) == 64 and remote.etag != sha256:
            raise InvalidArtifact(
                f"the hub has {place} with sha256 {remote.etag[:12]}, needs {sha256[:12]}; it was not downloaded."
            )
        if known and not sha256 and len(remote.etag) == 64 and remote.etag != known:
            raise InvalidArtifact(changed(place, known, remote.etag))
        folder = repo_folder_name(repo_id=place.repository, repo_type="model")
        cache = Path(constants.HF_HUB_CACHE)
        blob = cache / folder / "blobs" / remote.etag
        if not blob.exists():
            with _alone(cache / ".locks" / folder / f"{remote.etag}.lock", place):
                _transfer(place, url, remote, blob, sha256, check)
        # the content is in the cache: the client only adds a link under the commit
        path = hf_hub_download(place.repository, place.file, revision=remote.commit_hash)
        return Fetched(Path(path), remote.commit_hash)


def unavailable(place: Place) -> str:
    """Explain why a file on the hub is unavailable, as the beginning of a sentence; empty if it is available.

    Args:
        place: the file; it is not downloaded, and a cached file needs no request.
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
        return "the server at the hub's address is not a hub"
    return ""


def changed(place: Place, known: str, found: str) -> str:
    """Return the error message for a file that has changed on the hub."""
    return (
        f"{place} was pulled before with sha256 {known[:12]} and now has {found[:12]}; it was rejected. To keep the "
        f"old file, do nothing; for the new one, pull it with --sha256 {found}."
    )


def _cached(place: Place) -> Path | None:
    """Return the file if it is in the hub's cache."""
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
    """Download into a file next to ``blob`` that survives an interruption, check it, and rename it to ``blob``."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob.parent.mkdir(parents=True, exist_ok=True)
    # the client deletes its partial files at exit; the digest in the name separates different contents
    partial = blob.with_name(f"{blob.name}.loramix.incomplete")
    held = partial.stat().st_size if partial.exists() else 0
    if remote.size is not None:
        if held > remote.size:
            partial.unlink()
            held = 0
        need_room(blob, remote.size - held, place)
    try:
        # plain HTTP: the client's optional transfer library cannot resume
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
        if not hasattr(error, "response"):  # a full disk, or more data than announced
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
    else:  # git's digest, for small files
        content = path.read_bytes()
        found, wanted, kind = (
            hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            etag,
            "git digest",
        )
    if found != wanted:
        raise InvalidArtifact(
            f"{place} came with {kind} {found[:12]}, needs {wanted[:12]}; it was discarded. Pull it again; if the "
            "digest is the same, the hub or a proxy has other content."
        )


def need_room(path: Path, size_bytes: int, place: Place) -> None:
    """Check the free space for a download."""
    fix = "make room, or set HF_HOME (files of the hub) or LORAMIX_DATA (packs) to another disk."
    need_space(path, size_bytes, str(place), spare_bytes=SPARE_BYTES, fix=fix)


@contextmanager
def _alone(lock: Path, place: Place) -> Iterator[None]:
    """Hold the lock that the hub's client uses for the same file."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0.5):
            yield
    except Timeout:
        raise Busy(
            f"another process is fetching {place}; run the command again when it has finished."
        ) from None
