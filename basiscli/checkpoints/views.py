"""Checkpoints opened lazily: opening reads the headers, data is read a tensor or rows at a time."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.dtypes import raw_bytes, torch_dtype
from basiscli.checkpoints.files import INDEX_FILE, SINGLE_FILE, read_json
from basiscli.checkpoints.header import Header, StoredTensor, read_header
from basiscli.checkpoints.source import Source
from basiscli.errors import InputError

if TYPE_CHECKING:
    import torch

_AGAIN = "download the checkpoint again, or save it again"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


class Checkpoint:
    """The tensors of a safetensors checkpoint by name: a folder of shards, or one file.

        checkpoint = Checkpoint.open(resolve("org/name"))
        checkpoint.tensors["lm_head.weight"].shape  # from the header
        checkpoint.read("lm_head.weight", slice(0, 1024))  # bfloat16 [1024, in], as stored
        checkpoint.close()

    Threads may read at the same time.
    """

    def __init__(
        self,
        source: Source,
        files: Iterable[Path],
        tensors: dict[str, StoredTensor],
        config: dict[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.files = sorted(files)
        self.tensors = tensors
        self._config = config
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, source: Source) -> Checkpoint:
        """Return a checkpoint after reading its headers; pickled and GGUF files are first converted into the cache.

        Raises:
            InputError: no weights, a missing shard, a wrong index or header, or an adapter.
        """
        path = source.path
        if source.is_adapter:
            raise InputError("this is an adapter, not a full checkpoint", file=path, remedy="give its base instead")
        files, where = _weight_files(path)
        if not files:
            from basiscli.checkpoints.convert import converted

            path = converted(source)
            files, where = _weight_files(path)
            if (path / "config.json").is_file():
                source = Source(source.spec, path, source.repo_id, source.revision)
        headers = {file: read_header(file, headers_only=source.headers_only) for file in files}
        return cls(source, headers, _collect(headers, where))

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`; of an assembled checkpoint, the configuration that fits its tensors."""
        return self.source.config if self._config is None else self._config

    @property
    def vocabulary_size(self) -> int | None:
        """`vocab_size` of the configuration: rows of the embedding. None if it is not given."""
        size = self.config.get("vocab_size") or (self.config.get("text_config") or {}).get("vocab_size")
        return size or None

    @property
    def is_assembled(self) -> bool:
        """Whether its tensors or rows come from several checkpoints; see `model.stacked` and `model.vocabulary`."""
        return self._config is not None

    def read(self, name: str, rows: slice | None = None, *, pinned: bool = False) -> torch.Tensor:
        """Return a tensor, or a slice of its first dimension, in its storage dtype on the CPU.

        In `pinned` memory it can be copied to a GPU asynchronously.

        Raises:
            InputError: the file cannot be read or ends before the tensor does.
        """
        import torch

        stored = self.tensors[name]
        shape, offset = stored.shape, stored.offset
        if rows is not None and shape:
            first, last, _ = rows.indices(shape[0])
            row_bytes = stored.nbytes // shape[0] if shape[0] else 0
            shape, offset = (last - first, *shape[1:]), offset + first * row_bytes
        tensor = torch.empty(shape, dtype=torch_dtype(stored.dtype), pin_memory=pinned)
        if tensor.numel():
            self._fill(raw_bytes(tensor), stored, offset)
        return tensor

    def close(self) -> None:
        """Close the files; `read` opens them again."""
        with self._lock:
            while self._descriptors:  # an interruption must not let a number be closed twice
                os.close(self._descriptors.popitem()[1])

    def _fill(self, buffer: memoryview, stored: StoredTensor, offset: int) -> None:
        with self._lock:
            descriptor = self._descriptors.get(stored.file)
            if descriptor is None:
                try:
                    descriptor = self._descriptors[stored.file] = os.open(stored.file, os.O_RDONLY)
                except OSError as error:
                    raise _unreadable(stored, f"cannot read: {error.strerror or error}") from error
        position = 0
        while position < len(buffer):
            try:
                got = os.preadv(descriptor, [buffer[position:]], offset + position)
            except OSError as error:
                raise _unreadable(stored, f"cannot read: {error.strerror or error}") from error
            if got == 0:
                raise _unreadable(stored, "the file became shorter while it was read")
            position += got


def row_blocks(shape: tuple[int, ...], elements: int) -> Iterator[slice | None]:
    """Yield slices of the first dimension with about `elements` elements each; None for a scalar or empty tensor.

    The blocks depend on the shape alone, never on workers or shards, so neither does any rounding.
    """
    if not shape or 0 in shape:
        yield None
        return
    step = max(1, elements * shape[0] // math.prod(shape))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def _unreadable(stored: StoredTensor, what: str) -> InputError:
    return InputError(what, file=stored.file, tensor=stored.name, remedy=_AGAIN)


def _weight_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the safetensors files that make up a model, and where an index says each tensor is."""
    if path.is_file():
        return ([path], {}) if path.suffix == ".safetensors" else ([], {})
    index = path / INDEX_FILE
    if index.is_file():
        return _indexed(index)
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE], {}
    files = sorted(path.glob("*.safetensors"))
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if shards and len(shards) == len(files):
        total = int(shards[0]["total"])
        missing = sorted(set(range(1, total + 1)) - {int(match["number"]) for match in shards})
        if missing:
            raise InputError(f"shard {missing[0]} of {total} is missing", file=path, remedy=_AGAIN)
        return files, {}
    if len(files) > 1:
        raise InputError(
            f"several weights files and no {INDEX_FILE}: {', '.join(f.name for f in files[:4])}",
            file=path,
            remedy="give the path of one of them",
        )
    return files, {}


def _indexed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError("the index has no weight_map from tensor names to files", file=index, remedy=_AGAIN)
    for shard in sorted(set(weight_map.values())):
        # A name that leaves the folder would make us read (and report on) any file of the machine.
        if shard != Path(shard).name or shard in {"", ".", ".."} or not shard.endswith(".safetensors"):
            raise InputError(
                f"the index names '{shard}', which is no safetensors file of this folder", file=index, remedy=_AGAIN
            )
        if not (index.parent / shard).is_file():
            raise InputError(
                f"the index names {shard}, and that file is missing",
                file=index,
                remedy=_AGAIN,
            )
    where = {name: index.parent / shard for name, shard in weight_map.items()}
    return sorted(set(where.values())), where


def _collect(headers: dict[Path, Header], where: dict[str, Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for name, tensor in header.tensors.items():
            if where.get(name, file) != file:
                continue  # the index says that another shard's copy counts
            if name in tensors:
                raise InputError(
                    f"the tensor is also in {tensors[name].file.name}", file=file, tensor=name, remedy=_AGAIN
                )
            tensors[name] = tensor
    for name, file in where.items():
        if name not in tensors:
            raise InputError(
                "the index says the tensor is in this file, and it is not", file=file, tensor=name, remedy=_AGAIN
            )
    return tensors
