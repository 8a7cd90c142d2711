"""Tasks of EleutherAI's lm-evaluation-harness: finding them before a model is loaded, and a model's scores in them.

The harness is the extra `eval`. It is given a model that is loaded already, so a compressed one answers with its small
cache. Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from basiscli.errors import InputError, UsageError
from basiscli.progress import Progress


@dataclass(frozen=True)
class TaskScore:
    """What one model scores in a task, or in a group of tasks."""

    task: str
    metric: str
    """As the harness names it, with the filter of the answers if there is one: 'acc', 'exact_match,strict-match'."""
    value: float
    stderr: float | None

    @property
    def name(self) -> str:
        """The number's name: `task_arc_easy_acc`."""
        return number_prefix(self.task) + _word(self.metric)


@dataclass(frozen=True)
class Tasks:
    """Tasks that the harness knows, and how many examples it gives."""

    names: Sequence[str]
    limit: int | None
    few_shot: int | None
    index: Any
    """The harness's `TaskManager`."""

    def score(self, model: Any, tokenizer: Any, progress: Progress) -> list[TaskScore]:
        """Give the tasks to a model.

        Args:
            model: a causal language model of transformers; its device is where the work is done.
            tokenizer: the model's.
            progress: advances by one a task.

        Raises:
            InputError: the definition of a task does not fit its data, or its metric fails.
        """
        scores = []
        for name in self.names:
            scores += _scores(self._results(name, model, tokenizer))
            progress.advance(1)
        return scores

    def _results(self, name: str, model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
        from jinja2 import TemplateError

        with _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            try:
                found: dict[str, dict[str, Any]] = simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer),
                    tasks=[name],
                    num_fewshot=self.few_shot,
                    limit=self.limit,
                    task_manager=self.index,
                    bootstrap_iters=1000,  # for metrics without a formula; the error is then known to 3 %
                    log_samples=False,
                )["results"]
            except (OSError, ValueError, KeyError, ImportError, AssertionError, TemplateError) as error:
                raise _failure(name, error, "correct the task's definition") from error
        return found


def find_tasks(
    names: Sequence[str], *, folder: str | Path | None = None, limit: int | None = None, few_shot: int | None = None
) -> Tasks | None:
    """Look tasks up by name and see that their data loads; None if none is asked for.

    Args:
        names: of tasks, groups and tags.
        folder: task YAML files of the user's own; their names win over the harness's.
        limit: examples of each task; all by default.
        few_shot: solved examples before each; by default as many as the task says.

    Raises:
        UsageError: the harness is not installed, or does not know a name; an option that makes no sense.
        InputError: a task's data or definition does not load.
    """
    if not names:
        if folder is not None or limit is not None or few_shot is not None:
            raise UsageError("a task folder, task limit or few-shot count without tasks", remedy="add --tasks NAME")
        return None
    if len({number_prefix(name) for name in names}) < len(names):
        raise UsageError(f"tasks {', '.join(names)}: two have one name", remedy="name each once")
    for option, value, least in (("task limit", limit, 1), ("few-shot count", few_shot, 0)):
        if value is not None and value < least:
            raise UsageError(f"{option} {value}", remedy=f"at least {least}")
    if folder is not None and not any(Path(folder).rglob("*.yaml")):
        raise UsageError("no task files (*.yaml)", file=folder, remedy="give the folder that holds them")
    with _quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UsageError(
                "tasks need lm-evaluation-harness, which is not installed", remedy="pip install 'basiscli[eval]'"
            ) from error
        index = TaskManager(include_path=None if folder is None else str(folder))
    known = index.all_tasks
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            listed = "`lm-eval ls tasks` lists all"
            raise UsageError(f"no task '{name}'", remedy=f"did you mean '{near[0]}'? ({listed})" if near else listed)
    for name in names:
        _load(name, index)
    return Tasks(tuple(names), limit, few_shot, index)


def _load(name: str, index: Any) -> None:
    """Load a task's data into the cache, from which the scoring takes it: what fails does so before the work."""
    with _quiet():
        from lm_eval.tasks import get_task_dict

        try:
            get_task_dict([name], index)
        except Exception as error:  # a task may be code of its own, and data sets fail in many ways
            raise _failure(name, error, "its data comes from the Hub unless it is cached: be online once") from error


def _failure(name: str, error: Exception, remedy: str) -> InputError:
    return InputError(f"task '{name}': {(str(error) or type(error).__name__).splitlines()[0]}", remedy=remedy)


def number_prefix(task: str) -> str:
    """Return what the names of a task's numbers begin with."""
    return f"task_{_word(task)}_"


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _scores(results: dict[str, dict[str, Any]]) -> list[TaskScore]:
    """Return the scores among the harness's results.

    Keys are 'METRIC,FILTER' and 'METRIC_stderr,FILTER'; other keys are titles and counts. An error that the harness
    cannot tell is the text 'N/A'.
    """
    scores = []
    for task, table in results.items():
        for key, value in table.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = table.get(f"{metric}_stderr,{answers}")
            scores.append(
                TaskScore(
                    task,
                    metric if answers == "none" else key,
                    float(value),
                    None if stderr is None or isinstance(stderr, str) else float(stderr),
                )
            )
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's prints, bars, advice and warnings off the terminal: stdout is one JSON document's."""
    logger = logging.getLogger("lm_eval")
    level, swallowed = logger.level, io.StringIO()
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(swallowed), redirect_stderr(swallowed):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
