"""Headers of a Hub model's weights without their data, for `--dry-run` and `basis inspect`.

huggingface_hub reads headers as well (`get_safetensors_metadata`), but keeps only what it parsed, and takes in whole
files from servers that do not know ranges. Here the headers' bytes are kept, and `read_header` judges them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from basiscli.checkpoints.cache import cache_folder, cached
from basiscli.checkpoints.files import ADAPTER_CONFIG, INDEX_FILE, REPORT
from basiscli.checkpoints.header import MAX_HEADER_BYTES, header_end, read_header
from basiscli.checkpoints.kv_file import CONFIG_FILE
from basiscli.errors import HubError, InputError
from basiscli.hub.client import BESIDE_WEIGHTS, fetch, in_cache, model_spec, no_weights, pull, weights_among
from basiscli.hub.errors import translate_errors, with_retries
from basiscli.version import __version__

_BESIDE = ["config.json", ADAPTER_CONFIG, INDEX_FILE, CONFIG_FILE, REPORT, "README.md"]  # what plans read
_FIRST = 100_000  # bytes to ask for first: nearly every header is shorter, and asking twice takes twice as long
_BLOCK = 1 << 16
_AT_A_TIME = 8


def pull_headers(repo_id: str, revision: str | None, *, tokenizer: bool = False) -> tuple[Path, str | None, bool]:
    """Return a local folder of a Hub model with only the headers of its weights, or the whole model if it is cached.

    Headers are cached by commit, so that a second call only asks the Hub for the revision's commit.

    Args:
        repo_id: `org/name`.
        revision: a branch, tag or commit; None for the default branch.
        tokenizer: also fetch the tokenizer and the other files beside the weights.

    Returns:
        The folder, its commit, and whether it has the weights' data; else its shards end after the header.

    Raises:
        HubError: as for `hub.client.pull`.
        InputError: the repository has no safetensors, or an inconsistent header.
    """
    from huggingface_hub import errors, try_to_load_from_cache

    with translate_errors(model_spec(repo_id, revision), writing=False):
        try:
            commit, names = _listing(repo_id, revision)
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
            here = None if isinstance(error, errors.RevisionNotFoundError) else _kept(repo_id, revision, tokenizer)
            if here is not None:
                return here
            commit, names = with_retries(lambda: _listing(repo_id, revision))
        weights = weights_among(names)
        if not weights:
            raise no_weights(repo_id)
        if all(isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str) for name in weights):
            return *pull(repo_id, commit), True
        if not weights[0].endswith(".safetensors"):
            raise InputError(
                f"{repo_id} has no safetensors, and other weights have no header that could be fetched without them",
                remedy=f"download it first: `hf download {repo_id}{f' --revision {revision}' if revision else ''}`",
            )
        beside = BESIDE_WEIGHTS if tokenizer else _BESIDE
        place = _place(repo_id, commit, tokenizer)
        folder = cached(place, lambda out: _fill(out, repo_id, commit, beside, weights))
    return folder, commit, False


def _listing(repo_id: str, revision: str | None) -> tuple[str, list[str]]:
    """Return the commit that a revision stands for, and the names of its files."""
    from huggingface_hub import HfApi, errors, get_session

    api = HfApi(library_name="basiscli", library_version=__version__)
    try:
        info = api.model_info(repo_id, revision=revision, timeout=get_session().timeout)
    except errors.HfHubHTTPError:
        raise
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise errors.LocalEntryNotFoundError("no answer") from error
    if not re.fullmatch(r"\w+", info.sha or ""):  # it becomes a folder's name
        raise HubError(f"the Hub names no commit of {repo_id}", remedy="what answers may be no Hub: see HF_ENDPOINT")
    return info.sha, [file.rfilename for file in info.siblings or []]


def _kept(repo_id: str, revision: str | None, tokenizer: bool) -> tuple[Path, str | None, bool] | None:
    """Return what an earlier call left of a model, for when the Hub cannot be asked."""
    folder = in_cache(repo_id, revision)
    if folder is not None:
        return folder, folder.name, True
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and _place(repo_id, revision, tokenizer).is_dir():
        return _place(repo_id, revision, tokenizer), revision, False
    return None


def _place(repo_id: str, commit: str, tokenizer: bool) -> Path:
    kind = "headers-and-tokenizers" if tokenizer else "headers"
    return cache_folder() / kind / repo_id.replace("/", "--") / commit


def _fill(folder: Path, repo_id: str, commit: str, beside: Sequence[str], weights: Sequence[str]) -> None:
    """Put what lies beside a model's weights into a folder, and the weights up to where their data begins."""
    snapshot = with_retries(lambda: fetch(repo_id, commit, beside))
    for file in {file for pattern in beside for file in snapshot.glob(pattern)}:
        shutil.copyfile(file, folder / file.name)
    pool = ThreadPoolExecutor(_AT_A_TIME)
    try:
        list(pool.map(lambda name: _fetch_header(repo_id, commit, name, folder / name), weights))
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch_header(repo_id: str, commit: str, name: str, file: Path) -> None:
    """Write a file of the Hub up to where its data begins.

    Raises:
        InputError: it is no safetensors file, is truncated, or its header lies.
    """
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo_id, name, revision=commit)
    whole = with_retries(lambda: _beginning(url, _FIRST, file))
    if file.stat().st_size >= 8:
        with file.open("rb") as stream:
            end = header_end(stream.read(8))
        if _FIRST < end <= 8 + MAX_HEADER_BYTES:
            whole = with_retries(lambda: _beginning(url, end, file))
        os.truncate(file, min(end, file.stat().st_size))
    try:
        read_header(file, headers_only=True, whole=whole)
    except InputError as error:
        raise InputError(
            error.what, file=f"{repo_id}@{commit}/{name}", tensor=error.tensor, remedy="do not use this model"
        ) from error


def _beginning(url: str, count: int, file: Path) -> int | None:
    """Write at most the first bytes of what is at an address; return how many there are in all, if that is said.

    A server that does not know ranges begins to send everything; the connection is let go of then.
    """
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="basiscli", library_version=__version__)
    headers |= {"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers) as response, file.open("wb") as out:
        if response.status_code == 416:  # of an empty file there is no first byte
            return 0
        hf_raise_for_status(response)
        for block in response.iter_raw(_BLOCK):
            out.write(block[: count - out.tell()])
            if out.tell() == count:
                break
        said = response.headers.get("content-range", "").rpartition("/")[2]
        said = said if response.status_code == 206 else response.headers.get("content-length", "")
        return int(said) if said.isdecimal() else None
