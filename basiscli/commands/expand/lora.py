"""Plain LoRA adapters that other adapters become: configuration and tensors, and how they are written."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basiscli.checkpoints.digests import digest, weights_digest
from basiscli.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE
from basiscli.checkpoints.header import TensorSpec
from basiscli.checkpoints.layout import Layout
from basiscli.checkpoints.source import Source
from basiscli.checkpoints.writer import PartialOutput
from basiscli.commands.expand.card import expanded_card
from basiscli.engine.output_folder import check_disk
from basiscli.errors import InputError, UsageError
from basiscli.reports.schema import read_report

if TYPE_CHECKING:
    from torch import Tensor

ITS_START = "give the adapter that this training began with"
"""The remedy where two adapters are not a training's end and beginning."""


class PlainLoRA(ABC):
    """A LoRA adapter in PEFT's form that is made of another adapter, a tensor at a time as it is written."""

    sources: list[Source]
    """The adapters that it is made of."""
    tensors: dict[str, TensorSpec]
    """What it holds by name, in the order of writing."""
    modules: int
    """How many have factors."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return `adapter_config.json`.

        Raises:
            UsageError: which base model it is for is not known.
        """

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a tensor as it is to be stored.

        Raises:
            InputError: what it is made of does not fit.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files of the sources."""


def write_lora(lora: PlainLoRA, out: Path, *, overwrite: bool) -> str:
    """Write an adapter's folder: weights, configuration and card; return the digest of its weights.

    Raises:
        UsageError, InputError, ResourceError: as the adapter's methods do, or the disk is full.
    """
    config = lora.config()
    layout = Layout.plan(lora.tensors.values(), 1 << 62, single_file=ADAPTER_FILE)
    check_disk(out, layout.nbytes)
    output = PartialOutput(out, layout, digest([json.dumps(config).encode()]), resume=False)
    try:
        written = {name: digest([output.write(name, lora.read(name))]) for name in lora.tensors}
        files = {
            ADAPTER_CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
            "README.md": expanded_card(config, out.name),
        }
        output.commit(files, overwrite=overwrite)
    except InputError:
        output.discard()
        raise
    finally:
        output.close()
    return weights_digest(lora.tensors.values(), written)


def original_model(initial: Source, given: str | None) -> str:
    """Return the Hub id or path of the model that `basis init` took an adapter from: as given, or from its report.

    Raises:
        UsageError: it is not given, and there is no such report.
    """
    if given is not None:
        return given
    report = read_report(initial.path)
    if report is None or report.command != "init":
        raise UsageError(
            "which model the initial adapter was made from is not known",
            remedy="say it with --base: its name is written into the result",
        )
    source = report.sources[0]
    return source.repo_id or str(Path(source.spec).resolve() if Path(source.spec).exists() else source.spec)
