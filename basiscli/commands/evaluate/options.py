"""What `basis eval` is told."""

from __future__ import annotations

from typing import Annotated

from basiscli.checkpoints.kv_file import Prefill
from basiscli.cli.fields import ModelName, Words, argument, option, whole_numbers
from basiscli.cli.options import Device


class EvalOptions(Device):
    """Options of `basis eval` and keywords of `basiscli.evaluate`."""

    model: Annotated[ModelName, argument("Folder or Hub id (org/name@revision).")] = "."
    text: Annotated[
        ModelName | None,
        option(
            "Text, JSONL, a folder, or safetensors tokens.", default="a small built-in mix", metavar="PATH",
            names="file",
        ),
    ] = None  # fmt: skip
    against: Annotated[
        ModelName | None,
        option("The model to hold it against, usually the one it was made from.", names="model"),
    ] = None
    length: Annotated[int, option("Tokens a window.")] = 512
    windows: Annotated[int, option("How many windows, spread over the text.")] = 16
    prefill: Annotated[Prefill, option("How prompts attend to themselves: compressed or exact.")] = "compressed"
    contexts: Annotated[
        list[int],
        whole_numbers("--contexts"),
        option("Time decoding after so many tokens: 512,2048.", metavar="NUMBERS"),
    ] = []  # noqa: RUF012
    new_tokens: Annotated[int, option("Tokens decoded for each timing.")] = 16
    tasks: Annotated[Words, option("Tasks of lm-evaluation-harness: arc_easy,hellaswag.", metavar="NAMES")] = []  # noqa: RUF012
    task_path: Annotated[
        ModelName | None,
        option("Folder with task YAML files of your own.", metavar="PATH", names="file"),
    ] = None
    task_limit: Annotated[int | None, option("Examples of each task.", default="all")] = None
    few_shot: Annotated[int | None, option("Solved examples before each.", default="the task's")] = None
