"""The options of `basis compress --method nola`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from basiscli.cli.fields import ModelName, Options, argument, option
from basiscli.cli.options import Device, HeadersOnly, Overwrite, Seed

_NOLA = "An adapter: --method nola"


class RandomBases(Options):
    """Options of the new adapter's size, fit and training."""

    bases: Annotated[int | None, option("Random matrices a factor.", panel=_NOLA)] = None
    rank: Annotated[int | None, option("Of the result.", "-r", default="what the bases span", panel=_NOLA)] = None
    bits: Annotated[int, option("Of a coefficient: 16, 8 or 4.", panel=_NOLA)] = 16
    base: Annotated[ModelName | None, option("The base.", default="the adapter's", panel=_NOLA, names="model")] = None
    weights_only: Annotated[bool, option("Without a base: match the matrices.", panel=_NOLA)] = False
    steps: Annotated[int, option("Steps on the adapter's logits.", panel=_NOLA)] = 200
    learning_rate: Annotated[float, option("Of those, as a share of the coefficients' size.", panel=_NOLA)] = 0.02
    min_fidelity: Annotated[float, option("Share of the effect that must survive.", panel=_NOLA)] = 0.5
    force: Annotated[bool, option("Write it all the same.", panel=_NOLA)] = False


class NolaOptions(RandomBases, Device, Seed, Overwrite, HeadersOnly):
    """Keywords of `basiscli.compress_adapter`."""

    adapter: Annotated[
        ModelName,
        argument("Folder or Hub id of a PEFT LoRA of linear layers."),
        Field(validation_alias=AliasChoices("adapter", "model")),
    ]
    method: Annotated[Literal["nola"], option("nola.", "-m")] = "nola"
    output: Annotated[Path | None, option("Folder to make.", "-o", default="./ADAPTER-nola")] = None
    calibration: Annotated[
        ModelName | None,
        option("Text, JSONL, a folder, or safetensors tokens.", default="a small built-in mix", names="file"),
    ] = None
    batch: Annotated[int, option("Windows a step.")] = 2
    length: Annotated[int, option("Tokens a window.")] = 256
