"""Error messages for failures of the Hugging Face hub, each with its fix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from loramix.errors import InvalidArtifact, LoramixError, MissingExtra, NoSpace, NotFound, UsageError
from loramix.models.hub_place import Place

_FULL = (28, 122)  # ENOSPC, EDQUOT


@contextmanager
def asking(place: Place) -> Iterator[None]:
    """Convert exceptions of the hub's client into errors with one sentence.

    Args:
        place: place of the request, for messages.

    Raises:
        MissingExtra: the client is not installed.
        NotFound, NoSpace, UsageError: see `loramix.models.hub.fetch`.
    """
    if not any(map(os.environ.get, ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"))):
        try:
            Path.home()
        except RuntimeError:  # the client would make a directory named "~" in the current one
            raise NotFound(
                "this user has no home directory for the hub's cache: set HF_HOME, or HOME."
            ) from None
    try:
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtra("the hub's client is not installed: pip install 'loramix[hub]'.") from None
    try:
        yield
    except (
        errors.HfHubHTTPError,
        errors.HTTPError,
        errors.HFValidationError,
        errors.OfflineModeIsEnabled,
    ) as error:
        raise _explained(error, place) from None
    except UnicodeEncodeError:  # the token goes into a header
        token = token_source()
        what = f"the token in {token.place}" if token else f"the name {place!s:.200}"
        raise UsageError(
            f"{what} has a character that no {'token' if token else 'name'} has; copy it again."
        ) from None
    except errors.FileMetadataError:
        raise NotFound(
            f"the server that answers for {place} is not a hub; check HF_ENDPOINT and the proxy."
        ) from None
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace(
                f"the disk is full, so {place} was not downloaded and its partial file was deleted; make room, "
                "or set HF_HOME to another disk."
            ) from None
        if error.errno is None:  # the client's error for a wrong length
            reason = str(error).splitlines()[0]
            raise InvalidArtifact(
                f"{place} has a wrong length ({reason}) and was discarded; pull it again."
            ) from None
        raise


def log_in() -> str:
    """Return how to give the hub's client a token that it sends, as an imperative."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return "unset HF_HUB_DISABLE_IMPLICIT_TOKEN, with which no token is sent"
    return "log in with 'hf auth login', or set HF_TOKEN"


def _explained(error: Exception, place: Place) -> LoramixError:
    """Convert an exception of the hub's client into an error with one sentence."""
    from huggingface_hub import errors

    name = place.repository
    if isinstance(error, errors.GatedRepoError):
        token = token_source()
        if token and _status(error) == 401:
            return NotFound(_stale(place, token))
        then = f"with the account whose token is in {token.place}" if token else f"then {log_in()}"
        return NotFound(
            f"{name} is gated: accept its terms on its page on the hub, {then}, and run the command again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        if _status(error) != 401:
            return NotFound(f"there is no repository {name} on the hub; check the name.")
        if token := token_source():
            return NotFound(_stale(place, token))
        return NotFound(
            f"{name} does not exist on the hub, or it is private and this user has no access: "
            f"check the name, or {log_in()}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFound(f"{name} has no revision {place.revision!r}; give a branch, tag or commit of it.")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return NotFound(
            f"{name} has no file {place.file!r} at revision {place.revision}; see its page on the hub."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return NotFound(
            f"{place} is not in the hub's cache, and HF_HUB_OFFLINE prevents its download: unset the variable, "
            "then run the command again."
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{name!r} is not a repository; give OWNER/REPO.")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, place)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return NotFound(
        f"the hub cannot be reached for {place} ({reason}): check the network, then run the same command again; "
        "it resumes the download."
    )


def _refused(error: Any, place: Place) -> NotFound:
    """Return the error for an HTTP status, with its cause and fix."""
    status, said = _status(error), getattr(error, "server_message", None)
    if status not in (401, 403):
        return NotFound(f"the hub failed to serve {place} (HTTP {status}); try again later.")
    why = f" ({said})" if said else ""
    token = token_source()
    if token and status == 401:
        return NotFound(_stale(place, token))
    if token:
        return NotFound(
            f"the hub refuses {place}{why}: the token in {token.place} lacks the permission; {log_in()}, "
            "with a token that has it."
        )
    return NotFound(f"the hub refuses {place}{why}: {log_in()}, with a token that has the permission.")


class Token(NamedTuple):
    """The source of a token for the hub."""

    place: str
    unset: str
    """How to remove the token, as an imperative."""
    renew: str
    """How to replace the token, as an imperative that ends with "a token"."""


def token_source() -> Token | None:
    """Return the source of the hub client's token; None if it has none, or sends none. The token itself is not read."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return Token(f"the environment variable {name}", f"unset {name}", f"set {name} to a token")
    path = Path(constants.HF_TOKEN_PATH)
    try:
        known = bool(path.read_bytes().strip())
    except OSError:
        return None
    return (
        Token(f"the file {path}", "run 'hf auth logout'", "run 'hf auth login' with a token")
        if known
        else None
    )


def _stale(place: Place, token: Token) -> str:
    """Return the error message for an invalid token, with which the hub refuses public repositories too."""
    return (
        f"the hub rejects the token in {token.place} (401) for {place}: it has expired, was revoked or "
        f"is mistyped. A public repository needs none: {token.unset}; for a private one, {token.renew} that is valid."
    )


def _status(error: Any) -> int:
    return int(error.response.status_code)
