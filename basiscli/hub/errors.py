"""Errors of the Hub and the network: which requests are tried again, and messages with remedies.

huggingface_hub tries some requests again by itself (uploads, lists, downloads) and others not (commits, model info).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from basiscli.errors import BasisError, HubError, InputError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

PAUSES = (1.0, 3.0)  # seconds before the second and the third try
_LONGEST_WAIT = 300.0  # the window of the Hub's rate limits
_SILENCE = 60.0  # seconds without a byte after which a connection counts as lost; huggingface_hub waits for ever
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_LOG = logging.getLogger(__name__)


class DamagedDownload(Exception):
    """Raised for a downloaded file that does not have the digest that the Hub gives."""


def with_retries(act: Callable[[], T]) -> T:
    """Call a function and return its result, up to twice more after transient errors of the Hub or the network.

    The pauses are `PAUSES`, or as long as the Hub asks for, up to 300 seconds.
    """
    for pause in PAUSES:
        try:
            return act()
        except Exception as error:
            wait = _wait(error, pause)
            if wait is None:
                raise
            _LOG.warning("%s: trying again in %.0f s", redacted(_first_line(_cause(error))), wait)
            time.sleep(wait)
    return act()


@contextmanager
def translate_errors(what: str, *, writing: bool) -> Iterator[None]:
    """Turn errors of huggingface_hub in the block into `HubError`s without secrets, and time out silent connections.

    Args:
        what: the model for the message: `org/name@revision`.
        writing: whether the block uploads.
    """
    from huggingface_hub import get_session

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_HARMLESS)  # adding it twice does nothing
    session = get_session()
    before, session.timeout = session.timeout, _SILENCE
    try:
        yield
    except BasisError:
        raise
    except Exception as error:
        found = _ours(error, what, writing=writing)
        if found is None:
            raise
        raise found from error
    finally:
        session.timeout = before


def redacted(text: str) -> str:
    """Return text with the token and the query strings of URLs (signatures) removed."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # the exchange for a short-lived token failed: there is none to hide
        token = None
    if token:
        text = text.replace(token, "<token>")
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


class _Harmless(logging.Filter):
    """Cleans what huggingface_hub logs: it names the addresses that it tries again."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


_HARMLESS = _Harmless()


def _cause(error: BaseException) -> BaseException:
    """Return what is below huggingface_hub's 'nothing in the cache' and 'error while uploading'."""
    from huggingface_hub import errors

    while isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _wait(error: Exception, pause: float) -> float | None:
    """Return the seconds after which to try again, None where that does not help."""
    from huggingface_hub import errors

    cause = _cause(error)
    if isinstance(cause, errors.HfHubHTTPError):
        wait = max(pause, _asked_to_wait(cause))
        return wait if cause.response.status_code in _TRANSIENT and wait <= _LONGEST_WAIT else None
    # errors.HTTPError is that of the HTTP client (httpx or httpx2): the connection was refused, lost or silent.
    return pause if isinstance(cause, (errors.HTTPError, DamagedDownload)) else None


def _asked_to_wait(error: HfHubHTTPError) -> float:
    """Return the seconds that an answer asks to wait: `Retry-After: 30`, or the Hub's `RateLimit: "api";r=0;t=30`."""
    named: str = error.response.headers.get("retry-after", "")
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", error.response.headers.get("ratelimit", ""))
    return float(limit[1] if limit else named) if limit or named.isdigit() else 0.0


def _ours(error: Exception, what: str, *, writing: bool) -> BasisError | None:
    """Return our error for one of huggingface_hub's, from the most to the least specific; None for a bug."""
    from huggingface_hub import errors

    cause = _cause(error)
    if isinstance(cause, errors.GatedRepoError):
        return HubError(
            f"{what} is gated: your account has no access",
            remedy="ask for access on its page and log in with `hf auth login`, or give the path of a local copy",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        repo_id, _, revision = what.partition("@")
        return HubError(
            f"{repo_id} has no revision '{revision}'", remedy="give a branch, a tag or a full commit hash after the @"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return HubError(
            f"there is no model {what} on the Hub, or it is private",
            remedy="check the spelling; for a private model log in with `hf auth login`"
            + ("" if writing else "; for a folder, give its path"),
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return _refused(what, cause, writing=writing)
    if isinstance(cause, errors.LocalTokenNotFoundError):
        return HubError(
            f"cannot push to {what}: nobody is logged in", remedy="log in with `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(cause, DamagedDownload):
        return HubError(
            f"{what}: {cause}, also when it was downloaded again",
            remedy="try again later; a proxy may change what it passes on, or the repository is damaged",
        )
    offline = isinstance(cause, errors.OfflineModeIsEnabled)
    if writing and offline:
        return HubError(f"cannot push to {what}: HF_HUB_OFFLINE is set", remedy="unset HF_HUB_OFFLINE")
    no_hub = isinstance(cause, errors.FileMetadataError)  # something else answered
    if offline or (isinstance(error, errors.LocalEntryNotFoundError) and not no_hub):
        return HubError(
            f"{what} is not in the cache, and the Hub cannot be reached",
            remedy="connect, unset HF_HUB_OFFLINE, or give the path of a local copy",
        )
    if isinstance(cause, errors.HTTPError):
        return HubError(
            f"the connection to the Hub was lost ({redacted(_first_line(cause))}): {what}",
            remedy="check the network and try again" + ("; what is there already is not sent again" if writing else ""),
        )
    if isinstance(cause, ValueError) and not writing:  # a file name that leads out of the folder, most of all
        return InputError(f"{what} is refused: {redacted(_first_line(cause))}", remedy="do not use this model")
    if writing and "xet-write-token" in str(cause):
        return HubError(
            f"could not push to {what}: this Hub gives no access to Xet storage",
            remedy="a Hub of your own may not have it: set HF_HUB_DISABLE_XET=1",
        )
    by_library = type(cause).__module__.startswith(("huggingface_hub", "hf_xet"))
    if isinstance(cause, OSError) or by_library or (writing and isinstance(cause, (ValueError, RuntimeError))):
        return HubError(
            f"could not {'push to' if writing else 'get'} {what}: {redacted(_first_line(cause))}",
            remedy="check the network and the disk, and try again",
        )
    return None


def _refused(what: str, error: HfHubHTTPError, *, writing: bool) -> HubError:
    """Return the error for an answer that says no, with what helps against that status."""
    status = error.response.status_code
    words = redacted(_first_line(error.server_message)) if writing and error.server_message else ""
    remedies = {
        401: "log in again with `hf auth login`: the token is not valid",
        403: f"log in with `hf auth login` as somebody who may {'write to' if writing else 'read'} it",
        409: "somebody else changed it at the same time: try again",
        412: "somebody else changed it at the same time: try again",
        429: "too many requests: wait a few minutes, or log in with `hf auth login`",
    }
    return HubError(
        f"the Hub answered {status} for {what}{': ' if words else ''}{words}",
        remedy=remedies.get(status, "try again later" if status in _TRANSIENT else "see what the Hub says"),
    )


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
