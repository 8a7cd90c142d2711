"""Running the steps of a recipe: a step can use earlier outputs, and unchanged steps are skipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basiscli.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILE
from basiscli.checkpoints.source import Source, is_hub_id
from basiscli.commands.run.state import STATE, State, digest_of
from basiscli.commands.run.steps import Step
from basiscli.errors import BasisError, InputError, UsageError
from basiscli.gates import Outcome, failure_of
from basiscli.hub.resolve import resolve
from basiscli.names import for_json
from basiscli.progress import Progress
from basiscli.version import __version__


@dataclass(frozen=True)
class StepResult:
    """The result of one step."""

    name: str
    command: str
    path: Path | None
    """The folder it made, or the file of an evaluation's figures."""
    numbers: Mapping[str, float]
    url: str | None = None
    """Of a push: the pull request or commit."""
    done_before: bool = False
    """Whether an earlier run did it and nothing changed, so that it was skipped."""
    gates: list[Outcome] = field(default_factory=list)
    """Outcomes of its `fail_if`."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return {
            "name": self.name,
            "command": self.command,
            "path": None if self.path is None else str(self.path),
            "numbers": for_json(self.numbers),
            "url": self.url,
            "done_before": self.done_before,
            "gates": [outcome.as_dict() for outcome in self.gates],
        }


@dataclass
class Pipeline:
    """The steps of a recipe, and the folder of their outputs, one folder per step.

        pipeline = Pipeline(file, read_steps(read_yaml(file), file), Path("out").resolve())
        results = pipeline.run(Silent(), finished=lambda result: print(result.name, result.path))

    Raises:
        UsageError, InputError: steps in an impossible order, or an output folder that cannot be used.
    """

    file: Path
    steps: list[Step]
    folder: Path
    overwrite: bool = False
    state: State = field(init=False)

    def __post_init__(self) -> None:
        self.state = State.read(self.folder)
        self._check_order()
        self._check_places()

    def run(self, progress: Progress, finished: Callable[[StepResult], None]) -> list[StepResult]:
        """Run the steps in order, skipping unchanged ones that an earlier run did; return one result per step.

        Args:
            progress: the display.
            finished: called with each step's result.

        Raises:
            GateFailed: a step's numbers are outside its `fail_if`; the steps after it are not run.
            BasisError: raised by a step's command; the message names the step.
        """
        results: list[StepResult] = []
        outputs: dict[str, Path] = {}
        for step in self.steps:
            path, key = self.output_of(step), self.key(step, outputs)
            done = self.state.is_done(step.name, key, path)
            with naming_step(step):
                if not done:
                    self._do(step, key, outputs, progress)
                entry = self.state.steps[step.name]
                outcomes = [gate.outcome(entry.numbers) for gate in step.gates]
            results.append(StepResult(step.name, step.word, path, entry.numbers, entry.url, done, outcomes))
            if path is not None and step.makes_model:
                outputs[step.name] = path
            finished(results[-1])
            failure = failure_of(outcomes)
            if failure is not None:
                failure.file = str(self.file)
                failure.remedy = f"the steps after '{step.name}' were not done"
                raise failure
        return results

    def output_of(self, step: Step) -> Path | None:
        """Return the path of a step's output: a folder, or the file of an evaluation's figures; None for a push."""
        if step.command.makes == "commit":
            return None
        return self.folder / (f"{step.name}.json" if step.command.makes == "figures" else step.name)

    def key(self, step: Step, outputs: Mapping[str, Path], *, headers_only: bool = False) -> str:
        """Return a digest of all that a step's result depends on: command, options, contents of its inputs.

        Args:
            step: one of the steps.
            outputs: folders that earlier steps made, by step name.
            headers_only: of models on the Hub fetch headers alone, which give the same key.
        """
        inputs = {"": step.given, **{name: [str(step.options[name])] for name in step.inputs}}
        contents = {
            name: [self._content(step, resolve_word(word, outputs), headers_only=headers_only) for word in words]
            for name, words in inputs.items()
        }
        for name in step.sources:
            given = step.options.get(name) or []
            contents[name] = [self.state.content(Path(one)) for one in given if Path(one).exists()]
        return digest_of([__version__, step.word, step.given, step.decisive, contents])

    # One step ---------------------------------------------------------------------------------------------------------

    def _do(self, step: Step, key: str, outputs: Mapping[str, Path], progress: Progress) -> None:
        given, options = inputs_of(step, outputs)
        command, path = step.command, self.output_of(step)
        if path is None:
            pushed = command.do(step.bound(given, options), progress)
            self.state.record(step.name, key, None, {}, pushed.url)
            return
        ours = step.name in self.state.steps
        if not ours and not path.exists():
            self.state.begin(step.name)  # whatever ends this run, the next one may replace what it finds here
        if command.makes == "figures":
            evaluation = command.do(step.bound(given, options), progress)
            path.write_text(json.dumps(for_json(evaluation.as_dict()), indent=1, allow_nan=False) + "\n")
            self.state.record(step.name, key, path, evaluation.numbers, None)
            return
        if ours and _is_bare_adapter(path):
            shutil.rmtree(path)  # `expand` writes no report, by which `--overwrite` would know it
        made = command.do(step.bound(given, options, output=path, overwrite=self.overwrite or ours), progress)
        report = getattr(made, "report", None)
        self.state.record(step.name, key, path, report.numbers if report else {}, None)

    def _content(self, step: Step, word: str, *, headers_only: bool) -> Any:
        """Return what identifies an input, with the base that it names itself if the step names none."""
        path = Path(word).expanduser()
        if not path.exists():
            if step.command.makes == "commit" or not is_hub_id(word):
                return None  # a file that is missing, which the command says
            source = resolve(word, headers_only=headers_only)
            return f"{source.repo_id}@{source.revision}"
        content, source = self.state.content(path), Source(word, path)
        if "base" in step.options or not source.is_adapter or source.base_model is None:
            return content
        bases = [path / source.base_model, Path(source.base_model)]
        return [content, next((self.state.content(base) for base in bases if base.exists()), source.base_model)]

    # What is refused before the work ----------------------------------------------------------------------------------

    def _check_order(self) -> None:
        makers = {step.name: number for number, step in enumerate(self.steps) if step.makes_model}
        for number, step in enumerate(self.steps):
            for word in words_of(step):
                first = word.partition("/")[0]
                if makers.get(first, -1) >= number and not Path(word).exists():
                    raise InputError(
                        f"the step '{step.name}' takes what "
                        + ("itself makes" if first == step.name else f"'{first}' makes, which comes later"),
                        file=self.file,
                        remedy="put the steps in the order in which they need each other",
                    )

    def _check_places(self) -> None:
        made = {step.name for step in self.steps}
        if self.folder.is_file():
            raise UsageError("the output is a file", file=self.folder, remedy="choose another -o")
        inputs = {Path(w).resolve() for step in self.steps for w in words_of(step) if w.partition("/")[0] not in made}
        for path in inputs & {self.folder, *self.folder.parents}:
            if (path / "config.json").exists() or (path / ADAPTER_CONFIG).exists():
                raise UsageError(f"the output would lie inside an input: {path}", file=path, remedy="choose another -o")
        if self.overwrite or not self.folder.exists():
            return
        if not (self.folder / STATE).is_file() and any(self.folder.iterdir()):
            raise UsageError(
                "the folder exists, and no recipe made it",
                file=self.folder,
                remedy="choose another -o, or add --overwrite to replace what basis made in it",
            )
        for step in self.steps:
            output = self.output_of(step)
            if output is not None and output.exists() and step.name not in self.state.steps:
                raise UsageError(
                    f"'{step.name}' is there already, and this recipe did not make it",
                    file=output,
                    remedy="choose another -o, or add --overwrite to replace what basis made",
                )


def words_of(step: Step) -> list[str]:
    """Return the arguments and options of a step that may name an earlier step's output."""
    return [*step.given, *(str(step.options[name]) for name in step.inputs)]


def resolve_word(word: str, outputs: Mapping[str, Path]) -> str:
    """Return the path of an earlier step's output for `STEP` or `STEP/file`, any other word unchanged."""
    first, _, rest = word.partition("/")
    path = outputs.get(first)
    return word if path is None else str(path / rest if rest else path)


def inputs_of(step: Step, outputs: Mapping[str, Path]) -> tuple[list[str], dict[str, Any]]:
    """Return a step's arguments and options with names of earlier steps replaced by the paths of their outputs."""
    inputs = step.inputs
    options = {k: resolve_word(str(v), outputs) if k in inputs else v for k, v in step.options.items()}
    return [resolve_word(word, outputs) for word in step.given], options


@contextmanager
def naming_step(step: Step) -> Iterator[None]:
    """Add the step's name to the message of an error of the block."""
    try:
        yield
    except BasisError as error:
        error.what = f"step '{step.name}': {error.what}"
        raise


def _is_bare_adapter(path: Path) -> bool:
    names = {item.name for item in path.iterdir()} if path.is_dir() else set()
    return ADAPTER_CONFIG in names and names <= {ADAPTER_CONFIG, ADAPTER_FILE, "README.md"}
