"""Cost estimates of a recipe's steps: each is planned on placeholder outputs of the steps before it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from basiscli.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE
from basiscli.checkpoints.header import encode_header
from basiscli.checkpoints.layout import METADATA, Layout
from basiscli.checkpoints.sidecars import sidecar_files
from basiscli.checkpoints.views import Checkpoint
from basiscli.commands.run.pipeline import Pipeline, inputs_of, naming_step, words_of
from basiscli.commands.run.steps import Step
from basiscli.engine.pricing import Price


@dataclass(frozen=True)
class StepPlan:
    """The cost estimate of one step; figures are None where they depend on the data."""

    name: str
    command: str
    path: Path | None
    done_before: bool
    """Whether an earlier run did it and nothing changed, so that it costs nothing."""
    read_bytes: int | None = None
    write_bytes: int | None = None
    peak_bytes: int | None = None
    price: Price | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return vars(self) | {
            "path": None if self.path is None else str(self.path),
            "price": None if self.price is None else self.price.as_dict(),
        }


def price(pipeline: Pipeline) -> list[StepPlan]:
    """Return the cost estimate of every step, without writing an output.

    The output of a step that is not done is replaced by a temporary folder of headers without data, on which the steps
    after it are planned. Of models on the Hub that are not in the cache, only headers are fetched.
    """
    plans = []
    outputs: dict[str, Path] = {}
    undone: set[str] = set()
    unknown: set[str] = set()
    with TemporaryDirectory() as scratch:
        for step in pipeline.steps:
            path = pipeline.output_of(step)
            takes = {word.partition("/")[0] for word in words_of(step)}
            done = not takes & undone and pipeline.state.is_done(
                step.name, pipeline.key(step, outputs, headers_only=True), path
            )
            shadow = Path(scratch) / step.name
            plan = None if done or takes & unknown else _priced(step, path, outputs, shadow)
            plans.append(plan or StepPlan(step.name, step.word, path, done))
            if path is not None and step.makes_model:
                outputs[step.name] = path if done else shadow
                undone |= set() if done else {step.name}
                unknown |= set() if done or shadow.exists() else {step.name}
    return plans


def _priced(step: Step, path: Path | None, outputs: Mapping[str, Path], shadow: Path) -> StepPlan | None:
    """Plan a step and leave a hollow folder, its shadow, in the place of its result; None for one without a plan."""
    if step.command.plan is None:
        return None
    given, options = inputs_of(step, outputs)
    with naming_step(step):
        planned = step.command.planned(step.bound(given, options, output=shadow, headers_only=True))
    planned.close()
    layout: Layout = planned.layout
    model = getattr(planned, "reference", None) or getattr(planned, "model", None)
    if model is not None and layout.shards:
        _hollow(layout, model, getattr(planned, "adapter_rank", None) or getattr(planned, "rank", None), shadow)
    found = planned.price()
    read, write = (None, layout.nbytes) if found is None else (found.read_bytes, found.write_bytes)
    return StepPlan(step.name, step.word, path, False, read, write, getattr(planned, "peak_bytes", None), found)


def _hollow(layout: Layout, model: Checkpoint, rank: int | None, folder: Path) -> None:
    """Make a folder that looks like an output: headers, configuration and tokenizer, and holes for the data."""
    for shard in layout.shards:
        file = folder / shard.file
        file.parent.mkdir(parents=True, exist_ok=True)
        header, _ = encode_header(shard.tensors, METADATA)
        file.write_bytes(header)
        os.truncate(file, shard.nbytes)
    for name, index in layout.indexes().items():
        (folder / name).write_text(json.dumps(index))
    for home in {(folder / shard.file).parent for shard in layout.shards}:
        is_adapter = (home / ADAPTER_FILE).exists()
        files = _adapter_config(model, rank) if is_adapter else sidecar_files(model, None, code=False)
        for name, content in files.items():
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_bytes(content)


def _adapter_config(base: Checkpoint, rank: int | None) -> dict[str, bytes]:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base.source.path), "r": rank, "lora_alpha": rank}
    return {ADAPTER_CONFIG: json.dumps(config).encode()}
