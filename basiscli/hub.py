"""The Hugging Face Hub. Tokens, cache, endpoint and offline mode are left to huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from basiscli.errors import HubError, InputError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

# What makes a checkpoint or an adapter; never code, training state or other frameworks' copies of the weights.
_KEEP = ["*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
_SKIP = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*/*.safetensors", "*/*.bin"]


def pull(repo_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Download a model, or find it in the cache.

    Args:
        repo_id: `org/name`.
        revision: a branch, tag or commit; the default branch where none is given.

    Returns:
        The snapshot's folder and its commit.

    Raises:
        HubError: not found, gated, offline, rate limit, no connection: each with what to do.
    """
    from huggingface_hub import constants, errors, snapshot_download

    with _explained(repo_id, revision):
        for weights in ("*.safetensors", "*_model*.bin", "*.gguf"):
            folder = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=[*_KEEP, weights], ignore_patterns=_SKIP)
            )
            if any(folder.glob(weights)):
                break
        else:
            if constants.HF_HUB_OFFLINE:
                raise errors.LocalEntryNotFoundError("the cache holds a part of it, without weights")
            raise InputError(
                f"{repo_id} holds no weights (.safetensors, .bin or .gguf)", file=folder, remedy="give another model"
            )
    # huggingface_hub names a snapshot's folder by its commit.
    commit = folder.name if folder.parent.name == "snapshots" else None
    return folder, commit


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours, from the most to the least specific."""
    from huggingface_hub import errors

    what = f"{repo_id}@{revision}" if revision else repo_id
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what} is gated: your account has no access",
            remedy="ask for access on its page and log in with `hf auth login`, or give the path of a local copy",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo_id} has no revision '{revision}'",
            remedy="give a branch, a tag or a full commit hash after the @",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no model {repo_id} on the Hub, or it is private",
            remedy="check the spelling; for a private model log in with `hf auth login`; for a folder, give its path",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):  # it did answer, and there is no copy to fall back on
            raise _refused(what, error.__cause__) from error
        raise HubError(
            f"{what} is not in the cache, and the Hub cannot be reached",
            remedy="connect, unset HF_HUB_OFFLINE, or give the path of a local copy",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(what, error) from error
    except OSError as error:
        raise HubError(
            f"could not get {what}: {error}", remedy="check the network and the disk, and try again"
        ) from error


def _refused(what: str, error: HfHubHTTPError) -> HubError:
    """Return the error for an answer that says no, with what helps against that status."""
    status = error.response.status_code if error.response is not None else 0
    remedies = {
        401: "log in again with `hf auth login`: the token is not valid",
        403: "log in with `hf auth login` as somebody who may read it",
        429: "too many requests: wait a few minutes, or log in with `hf auth login`",
    }
    return HubError(
        f"the Hub answered {status or 'nothing'} for {what}", remedy=remedies.get(status, "try again later")
    )
