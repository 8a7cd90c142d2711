"""Downloads of models from the Hugging Face Hub, and uploads of outputs.

Tokens, cache, endpoint and offline mode are left to huggingface_hub.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basiscli.checkpoints.digests import file_digest
from basiscli.checkpoints.source import is_hub_id
from basiscli.errors import InputError, UsageError
from basiscli.hub.errors import DamagedDownload, translate_errors, with_retries
from basiscli.progress import Progress
from basiscli.version import __version__

# What makes a checkpoint or an adapter; never code, training state or other frameworks' copies of the weights.
BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md"]
_WEIGHTS = ("*.safetensors", "*_model*.bin", "*.gguf")  # the first kind that a model has is taken
_SKIP = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*/*.safetensors", "*/*.bin"]
# Files by whose names a model is loaded: one that an earlier push left would be loaded with, or instead of, the new.
_LOADED = re.compile(
    r"(.*/)?((pytorch_model|model|adapter_model|kv_projection)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    r"|kv_projection\.json|adapter_config\.json)"
)
_MAIN = "main"


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    repo_id: str
    revision: str
    """The branch that was pushed to."""
    commit: str
    """Its hash."""
    url: str
    """Of the pull request, or of the commit."""
    pull_request: bool
    """Whether a pull request was opened."""
    removed: list[str]
    """Files of an earlier model's weights that the same commit deleted."""


def pull(repo_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the local folder of a model of the Hub and its commit, downloading what the cache lacks.

        folder, commit = pull("org/name", "main")

    Args:
        repo_id: `org/name`.
        revision: a branch, tag or commit; None for the default branch.

    Returns:
        The snapshot's folder, and its commit hash (None where the folder does not tell).

    Raises:
        HubError: not found, gated, offline, rate limit, no connection, damaged bytes; each with a remedy.
        InputError: the repository has no weights, or a file name that leads out of the folder.
    """
    with translate_errors(model_spec(repo_id, revision), writing=False):
        folder = with_retries(lambda: _download(repo_id, revision))
    # huggingface_hub names a snapshot's folder by its commit.
    commit = folder.name if folder.parent.name == "snapshots" else None
    return folder, commit


def model_spec(repo_id: str, revision: str | None) -> str:
    """Return `org/name`, or `org/name@revision`."""
    return f"{repo_id}@{revision}" if revision else repo_id


def weights_among(names: Iterable[str]) -> list[str]:
    """Return those of a repository's file names that `pull` would download as weights; empty where there are none."""
    from huggingface_hub.utils import filter_repo_objects

    top = [name for name in names if "/" not in name]
    found = (list(filter_repo_objects(top, allow_patterns=kind, ignore_patterns=_SKIP)) for kind in _WEIGHTS)
    return next(filter(None, found), [])


def fetch(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the snapshot folder of a model with the files that match glob patterns, downloading what the cache lacks.

    Raises:
        DamagedDownload: a file does not have the digest that the Hub gives; it is then removed from the cache.
    """
    from huggingface_hub import constants, snapshot_download

    blobs = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    before = {file.name for file in blobs.glob("*")}
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=_SKIP))
    _check_digests(folder, before)
    return folder


def in_cache(repo_id: str, revision: str | None) -> Path | None:
    """Return the cached snapshot folder of a model with its weights, without a request; None if it is not cached."""
    from huggingface_hub import errors, snapshot_download

    for weights in _WEIGHTS:
        with suppress(errors.LocalEntryNotFoundError):
            folder = Path(
                snapshot_download(
                    repo_id, revision=revision, local_files_only=True, allow_patterns=weights, ignore_patterns=_SKIP
                )
            )
            if any(folder.glob(weights)):
                return folder
    return None


def no_weights(repo_id: str) -> InputError:
    """Return the error for a repository without weights."""
    return InputError(f"{repo_id} holds no weights (.safetensors, .bin or .gguf)", remedy="give another model")


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors

    for weights in _WEIGHTS:
        folder = fetch(repo_id, revision, [*BESIDE_WEIGHTS, weights])
        if any(folder.glob(weights)):
            return folder
    if constants.HF_HUB_OFFLINE:
        raise errors.LocalEntryNotFoundError("the cache holds a part of it, without weights")
    raise no_weights(repo_id)


def _check_digests(folder: Path, before: set[str]) -> None:
    """Compare what was downloaded just now with the digests that the Hub gave: huggingface_hub compares sizes only.

    Raises:
        DamagedDownload: a file has other bytes. It is gone from the cache then.
    """
    for link in folder.rglob("*"):
        if not link.is_symlink():
            continue
        blob = link.parent / link.readlink()  # named by the digest
        if blob.name not in before and not _fits(blob, blob.name):
            blob.unlink()
            link.unlink()
            raise DamagedDownload(f"the bytes of {link.relative_to(folder)} do not have the digest that the Hub names")


def _fits(file: Path, etag: str) -> bool:
    """Return whether a file has its digest: SHA-256 for large files, else git's; mirrors may name other things."""
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        return file_digest(file) == etag
    if re.fullmatch(r"[0-9a-f]{40}", etag):
        content = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content)
        return etag in {git.hexdigest(), hashlib.sha1(content).hexdigest()}  # the latter is Artifactory's
    return True


def check_login(repo_id: str) -> None:
    """Check that the token can push, before long work whose result is to be pushed.

    Raises:
        HubError: no token, an invalid one, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    with translate_errors(repo_id, writing=True):
        # A token of a trusted publisher (CI without a stored token) belongs to a repository, not to somebody.
        if not (os.environ.get("HF_OIDC_RESOURCE") and get_token()):
            with_retries(lambda: HfApi().whoami())


def upload(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    private: bool,
    create_pr: bool,
    revision: str,
    message: str,
    progress: Progress,
) -> Pushed:
    """Upload files to a model repository of the Hub in one commit, and return it.

    Large files are uploaded first, one after the other; those that the Hub has already are skipped, so that an
    interrupted push resumes. Only the commit, which comes last, makes them visible.

    Args:
        files: local files by their names in the repository.
        repo_id: `org/name`; created if it does not exist.
        private: create it as private.
        create_pr: open a pull request instead of committing to the branch.
        revision: the branch; created if it does not exist.
        message: of the commit.
        progress: the display; counts bytes.

    Raises:
        HubError: the Hub refuses, or the network fails.
        UsageError: `private` is set and the repository is public.
    """
    from huggingface_hub import HfApi

    target = repo_id if revision == _MAIN else f"{repo_id}@{revision}"
    api = HfApi(library_name="basiscli", library_version=__version__)
    with translate_errors(target, writing=True):
        with_retries(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not with_retries(lambda: api.model_info(repo_id)).private:
            raise UsageError(
                f"{repo_id} exists and is public", remedy="make it private in its settings, or leave out --private"
            )
        if revision != _MAIN and not revision.startswith("refs/"):
            with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        return _commit(api, files, repo_id, create_pr=create_pr, revision=revision, message=message, progress=progress)


def _commit(
    api: Any,
    files: Mapping[str, Path],
    repo_id: str,
    *,
    create_pr: bool,
    revision: str,
    message: str,
    progress: Progress,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    folders = {name.rpartition("/")[0] for name in files if _LOADED.fullmatch(name)}

    def attempt() -> Pushed:
        # Anew at every try: a commit whose answer was lost is then found to be there, and is not made twice.
        operations = {name: CommitOperationAdd(name, file) for name, file in files.items()}
        large = {name: one for name, one in operations.items() if name.endswith(".safetensors")}
        progress.start("upload", len(large), sum(one.upload_info.size for one in large.values()))
        for one in large.values():
            api.preupload_lfs_files(repo_id, [one], revision=revision, create_pr=create_pr, free_memory=False)
            progress.advance(one.upload_info.size)
        removed = [
            name
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in files and _LOADED.fullmatch(name) and name.rpartition("/")[0] in folders
        ]
        done = api.create_commit(
            repo_id,
            [*operations.values(), *map(CommitOperationDelete, removed)],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
        return Pushed(repo_id, revision, done.oid, done.pr_url or done.commit_url, bool(done.pr_url), removed)

    try:
        # A pull request whose answer was lost cannot be told from one that was not opened: it is not tried again.
        return attempt() if create_pr else with_retries(attempt)
    finally:
        progress.stop()


def parse_target(target: str, revision: str | None = None, *, create_pr: bool = False) -> tuple[str, str]:
    """Return (Hub id, branch) of `org/name` or `org/name@branch`; the branch is `main` by default.

    Raises:
        UsageError: it is neither, `revision` is a second branch, or a pull request is against another than main.
    """
    repo_id, at, named = target.partition("@")
    if not is_hub_id(target):
        raise UsageError(f"not a Hub id: '{target}'", remedy="write org/name or org/name@branch")
    if at and revision is not None:
        raise UsageError(f"two revisions: {named} and {revision}", remedy="give one")
    branch = (named if at else revision) or "main"
    if create_pr and branch != "main":
        raise UsageError("the Hub opens pull requests against main", remedy="leave out the branch, or --create-pr")
    return repo_id, branch
