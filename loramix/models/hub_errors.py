"""What can go wrong with the Hugging Face hub, each in one sentence with its mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loramix.errors import InvalidArtifact, MissingExtra, NoSpace, NotFound, UsageError

if TYPE_CHECKING:
    from loramix.models.hub import Place

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"
_FULL = (28, 122)  # ENOSPC, EDQUOT


@contextmanager
def asking(place: Place) -> Iterator[None]:
    """Turn whatever the hub's client raises into one sentence.

    Args:
        place: what it is asked for or given.

    Raises:
        MissingExtra: the client is not installed.
        NotFound, NoSpace, UsageError: see `loramix.models.hub.fetch`.
    """
    try:
        from huggingface_hub import errors
    except ImportError:
        raise MissingExtra("the hub needs its client: pip install 'loramix[hub]'.") from None
    name = place.repository
    try:
        yield
    except errors.GatedRepoError:
        raise NotFound(
            f"{name} is gated: accept its terms on its page on the hub, then {LOG_IN}, and run the command again."
        ) from None
    except errors.RepositoryNotFoundError as error:
        if _status(error) == 401:
            raise NotFound(
                f"the hub shows no {name} to this user: it does not exist, or it is private: "
                f"check the name, or {LOG_IN}."
            ) from None
        raise NotFound(f"there is no repository {name} on the hub; check the name.") from None
    except errors.RevisionNotFoundError:
        raise NotFound(
            f"{name} has no revision {place.revision!r}; give a branch, tag or commit of it."
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise NotFound(
            f"{name} has no file {place.file!r} at revision {place.revision}; see its page on the hub."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise NotFound(
            f"{place} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, "
            "then run the command again."
        ) from None
    except errors.HFValidationError:
        raise UsageError(f"{name!r} is no repository; the hub's are OWNER/REPO.") from None
    except errors.HfHubHTTPError as error:
        status, said = _status(error), getattr(error, "server_message", None)
        if status in (401, 403):
            why = f" ({said})" if said else ""
            raise NotFound(
                f"the hub refuses {place}{why}: {LOG_IN}, with a token that may do this."
            ) from None
        raise NotFound(f"the hub fails on {place} (HTTP {status}); try again later.") from None
    except errors.HTTPError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotFound(
            f"the hub cannot be reached for {place} ({reason}): check the network, then run the same command again; "
            "what has come so far is kept."
        ) from None
    except errors.FileMetadataError:
        raise NotFound(f"what answers for {place} is no hub; check HF_ENDPOINT and the proxy.") from None
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace(
                f"the disk is full, so {place} is not fetched and nothing of it is kept; make room, "
                "or set HF_HOME to another disk."
            ) from None
        if error.errno is None:  # the client's own complaint on a length
            reason = str(error).splitlines()[0]
            raise InvalidArtifact(
                f"{place} came with a wrong length ({reason}); not kept, fetch it again."
            ) from None
        raise


def _status(error: Any) -> int:
    return int(error.response.status_code)
