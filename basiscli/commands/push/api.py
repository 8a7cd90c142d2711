"""Pushing an output to the Hub: only what is complete and verified, and only files that belong to a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from basiscli.checkpoints.files import ADAPTER, read_json
from basiscli.checkpoints.shards import JOURNAL
from basiscli.checkpoints.source import models_in
from basiscli.cli.keywords import keywords
from basiscli.commands.push.options import PushOptions
from basiscli.commands.verify.api import verify
from basiscli.errors import InputError, UsageError
from basiscli.hub.client import Pushed, check_login, parse_target, upload
from basiscli.progress import Progress, Silent
from basiscli.reports.schema import read_report
from basiscli.runtime.export import exported_files
from basiscli.version import __version__

_SUFFIXES = {
    ".safetensors", ".json", ".md", ".svg", ".png", ".html", ".yaml", ".txt", ".jinja", ".model", ".spm", ".tiktoken",
    ".bpe", ".vocab",
}  # fmt: skip
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


@dataclass(frozen=True)
class PushResult:
    """The result of a push."""

    path: Path
    """The local folder."""
    url: str
    """Of the pull request, or of the commit."""
    repo_id: str
    revision: str
    commit: str
    pull_request: bool
    """Whether a pull request was opened."""
    files: list[str]
    """Names of the pushed files in the repository."""
    bytes: int
    """Their size."""
    checked_digests: bool
    """Whether there was a report to check the bytes of every tensor against."""
    left_out: list[str]
    """Files of the folder that are not pushed: code, hidden files, and files that are not a model's."""
    removed: list[str]
    """Files of an earlier model's weights that the same commit deleted."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return asdict(self) | {"path": str(self.path)}


@keywords(PushOptions)
def push(folder: str | Path, target: str, *, progress: Progress | None = None, **options: Any) -> PushResult:
    """Push an output to the Hub in one commit, and return the commit.

    Every tensor is checked first, as `verify` does. An interrupted push goes on where it stopped when it is given
    again: what the Hub has already is not sent again.

    Args:
        folder: what a command wrote; of `init`, the folder with `adapter/` and `residual/`, or one of them.
        target: `org/name`, or `org/name@branch`; model and branch are made where they do not exist.
        progress: a progress display; none by default.
        **options: by name:

    Raises:
        UsageError: no Hub id, or the folder is what an interrupted run left.
        InputError: the folder is damaged, holds no model, or links lead out of it.
        HubError: nobody is logged in, no right to write, network.
    """
    return run(PushOptions.of(folder=folder, target=target, **options), progress or Silent())


def run(options: PushOptions, progress: Progress) -> PushResult:
    """Push with these options, as `push` does."""
    repo_id, branch = parse_target(options.target, options.revision, create_pr=options.create_pr)
    folder = Path(options.folder).expanduser().resolve()
    files, left_out = _files(folder)
    check_login(repo_id)
    check = verify(folder, progress=progress)
    report = read_report(folder)
    done: Pushed = upload(
        files,
        repo_id,
        private=options.private,
        create_pr=options.create_pr,
        revision=branch,
        message=options.message or f"{report.command if report else 'Push'} with basis {__version__}",
        progress=progress,
    )
    return PushResult(
        path=folder,
        url=done.url,
        repo_id=repo_id,
        revision=branch,
        commit=done.commit,
        pull_request=done.pull_request,
        files=sorted(files),
        bytes=sum(file.stat().st_size for file in files.values()),
        checked_digests=check.checked_digests,
        left_out=left_out,
        removed=done.removed,
    )


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files to push by their names in the repository, and the names of those that are left out.

    Raises:
        UsageError: no folder, or one that an interrupted run left.
        InputError: a link that leads somewhere else.
    """
    if not folder.is_dir():
        raise UsageError("not a folder", file=folder, remedy="give the folder that a command wrote")
    if folder.suffix == ".partial" or (folder / JOURNAL).exists():
        raise UsageError(
            "the output is not complete",
            file=folder,
            remedy="give the command that makes it again: it goes on where it stopped",
        )
    files: dict[str, Path] = {}
    left_out = []
    code = _exported_code(models_in(folder))
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink():
            raise InputError(
                "a link: what it leads to could be anything on this machine",
                file=file,
                remedy="put the file itself in its place",
            )
        if not file.is_file():
            continue
        if _belongs(file, name) or file in code:
            files[name] = file
        else:
            left_out.append(name)
    if (folder / ADAPTER) in models_in(folder):  # the Hub shows the card at the top; init writes it beside the adapter
        files = _card_of(folder / ADAPTER) | files
    return files, left_out


def _belongs(file: Path, name: str) -> bool:
    if any(part.startswith(".") for part in name.split("/")):
        return False
    return file.suffix in _SUFFIXES or file.name.upper().startswith(_NAMES)


def _card_of(adapter: Path) -> dict[str, Path]:
    return {file.name: file for file in adapter.iterdir() if file.suffix in {".md", ".svg", ".png"}}


def _exported_code(parts: Iterable[Path]) -> set[Path]:
    """Return the Python files that `--export remote-code` wrote, byte for byte; no other code is ever pushed."""
    found = set()
    for folder in parts:
        config = folder / "config.json"
        if not read_json(config).get("auto_map"):
            continue
        try:
            written = exported_files(config.read_bytes())
        except InputError:
            continue
        for name, content in written.items():
            file = folder / name
            if file.suffix == ".py" and file.is_file() and file.read_bytes() == content:
                found.add(file)
    return found
