"""One declaration a command: the command line, the Python function and the recipe's step are made of it."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field
from typer.testing import Result

import basiscli
from basiscli.app import app
from basiscli.cli.command import Command, command_points, find_command, load_command
from basiscli.cli.fields import Option, Options, options_of
from basiscli.cli.save_recipe import as_step
from basiscli.cli.signature import terminal_function
from basiscli.commands.methods.cli import range_in_words
from basiscli.transforms import Parameters
from tests.conftest import basis_process, read_checkpoint
from tests.kv_models import make_model, save_model

Basis = Callable[..., Result]
EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin-command"
FUNCTIONS = {
    "merge": basiscli.merge, "init": basiscli.init, "extract": basiscli.extract, "expand": basiscli.expand,
    "eval": basiscli.evaluate, "push": basiscli.push, "run": basiscli.run,
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example package into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder, EXAMPLE], check=True, capture_output=True)
    return folder


def test_a_strangers_command_is_one_like_ours(installed: Path, family: dict[str, Path]) -> None:
    listed = basis_process("--help", PYTHONPATH=str(installed))
    assert "norms" in listed.stdout and "Print the largest norms" in listed.stdout
    done = basis_process("norms", family["a"], "--top", "2", "--json", PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    norms = {name: float(t.double().norm()) for name, t in read_checkpoint(family["a"]).items()}
    largest = dict(sorted(norms.items(), key=lambda item: -item[1])[:2])
    assert json.loads(done.stdout) == pytest.approx(largest)
    refused = basis_process("norms", "--topp", "2", PYTHONPATH=str(installed))
    assert refused.returncode == 2 and "--top" in refused.stderr
    missing = basis_process("norms", family["a"] / "nothing", PYTHONPATH=str(installed))
    assert missing.returncode == 3 and "error:" in missing.stderr


def test_a_command_that_does_not_load_is_one_line_of_warning(tmp_path: Path) -> None:
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[basis.command]\nbroken = nowhere:command\n")
    done = basis_process("--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "merge" in done.stdout
    assert "command 'broken' of broken does not load" in done.stderr


def test_two_commands_of_one_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-commands\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[basis.command]\nmerge = nowhere:command\n")
    done = basis_process("merge", "--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "basiscli" in done.stderr and "other-commands" in done.stderr


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_the_python_function_has_the_commands_options(name: str) -> None:
    model = find_command(name).model
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert set(options_of(model)) <= set(parameters)
    for option in options_of(model):
        field = model.model_fields[option]
        if not field.is_required() and parameters[option].default is not inspect.Parameter.empty:
            assert parameters[option].default == field.get_default(call_default_factory=True)
        assert f"{option}:" in (FUNCTIONS[name].__doc__ or "")


@pytest.mark.parametrize("name", sorted(command_points()))
def test_help_names_every_option_and_no_python_type(basis: Basis, name: str) -> None:
    command = load_command(command_points()[name])
    said = basis(name, "--help").output
    for option, meaning in options_of(command.model).items():
        if not (meaning.python_only or meaning.argument):
            flag = next(iter(meaning.flags), f"--{option.replace('_', '-')}").strip().strip("/")
            assert flag.split("/")[0] in said or f"--{option.replace('_', '-')}" in said
    assert "<bool>" not in said and "<list[Path]>" not in said


@pytest.mark.parametrize("spelled", ["q_proj,v_proj", ["q_proj", "v_proj"]], ids=["text", "list"])
def test_modules_are_spelled_alike_at_the_command_line_in_python_and_in_recipes(
    tmp_path: Path, basis: Basis, spelled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m", make_model())
    basiscli.init("m", rank=2, target_modules=spelled, output="python")
    words = spelled if isinstance(spelled, str) else ",".join(spelled)
    assert basis("init", "m", "-r", "2", "--target-modules", words, "-o", "words").exit_code == 0
    (tmp_path / "work.yaml").write_text(
        yaml.safe_dump({"steps": [{"init": "m", "rank": 2, "target_modules": spelled, "name": "made"}]})
    )
    assert basis("run", "work.yaml", "-o", "recipe").exit_code == 0
    factors = [
        (tmp_path / place / "adapter" / "adapter_model.safetensors").read_bytes()
        for place in ("python", "words", "recipe/made")
    ]
    assert factors[0] == factors[1] == factors[2]


def test_numbers_and_parameters_are_spelled_alike(
    family: dict[str, Path], tmp_path: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"merge": ["a", "b"], "method": "linear", "weights": "1,3", "parameters": ["normalize=false"], "name": "c"}
    (tmp_path / "work.yaml").write_text(yaml.safe_dump({"steps": [recipe]}))
    assert basis("run", "work.yaml", "-o", "recipe").exit_code == 0
    words = ["merge", "a", "b", "-m", "linear", "--weights", "1,3", "-p", "normalize=false", "-o", "words"]
    assert basis(*words).exit_code == 0
    basiscli.merge(["a", "b"], method="linear", weights=[1, 3], parameters={"normalize": False}, output="python")
    files = [(tmp_path / p / "model.safetensors").read_bytes() for p in ("recipe/c", "words", "python")]
    assert files[0] == files[1] == files[2]


def test_type_checkers_see_what_the_declarations_say() -> None:
    """`basiscli/__init__.pyi` is made by tools/make_stubs.py; formatted, so compared without white space."""
    from tools.make_stubs import FILE, stub

    def functions(text: str) -> list[str]:
        plain = re.sub(r",(?=[\])])", "", re.sub(r"\s", "", text).replace("'", '"'))
        return sorted(re.split(r"(?=def)", plain)[1:])

    assert functions(FILE.read_text()) == functions(stub())


def test_an_option_that_python_does_not_know_is_refused_with_the_nearest(family: dict[str, Path]) -> None:
    with pytest.raises(basiscli.UsageError, match="no option 'wieghts'") as caught:
        basiscli.merge([family["a"]], method="linear", wieghts=[1.0])
    assert "weights" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["merge", "--method", "or"], ["ortho"]),
        (["merge", "--dtype", "b"], ["bf16"]),
        (["merge", "--method", "ortho", "-p", "al"], ["alpha="]),
        (["compress", "--search", "s"], ["spectrum"]),
        (["compress", "--method", "n"], ["nola"]),
        (["methods", "show", "pis"], ["pissa"]),
    ],
)
def test_values_complete_in_the_shell(words: list[str], expected: list[str]) -> None:
    line = " ".join(["basis", *words])
    asked = {"_BASIS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    script = Path(sys.executable).with_name("basis")  # by its name the shell's variables are called
    done = subprocess.run([script], env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"ge": 0, "le": 1}, "0 to 1"), ({"gt": 0, "le": 1}, "above 0, at most 1"), ({"ge": 1}, "at least 1"),
        ({"ge": 0, "lt": 0.5}, "at least 0, below 0.5"), ({"gt": 0}, "above 0"), ({}, ""),
    ],
)  # fmt: skip
def test_ranges_are_said_in_words(bounds: dict[str, float], words: str) -> None:
    class Own(Parameters):
        share: float = Field(0.5, **bounds)

    assert range_in_words(Own.model_fields["share"].metadata) == words


def test_methods_that_commands_have_built_in_are_listed(basis: Basis) -> None:
    listed = basis("methods").stdout
    assert "compress --method nola" in listed
    assert any(line.split()[:2] == ["extract", "extract"] for line in listed.splitlines())
    assert "arXiv" in basis("methods", "show", "nola").stdout
    assert {"nola", "extract"} <= {one["name"] for one in json.loads(basis("methods", "--json").stdout)}


def test_the_whole_application_is_made_once() -> None:
    import basiscli.app

    assert basiscli.app.app is app


def test_options_are_refused_by_their_flag() -> None:
    class Own(Options):
        pass

    with pytest.raises(basiscli.UsageError, match="no option 'x'"):
        Own.of(x=1)


class Switches(Options):
    keep: Annotated[bool, Option("Keep it.")] = True
    words: Annotated[list[str], Option("Words.")] = ["a"]  # noqa: RUF012


def test_a_recipe_has_what_is_off_where_on_is_the_default() -> None:
    command = Command("switches", "Switch.", __name__, options=Switches, terminal=["quiet"])
    assert as_step(command, Switches()) == {"switches": None, "keep": True, "words": ["a"]}
    assert as_step(command, Switches(keep=False, words=[])) == {"switches": None, "keep": False, "words": []}
    assert command.terminal == ("quiet",)
    parameters = inspect.signature(terminal_function(command)).parameters
    info = parameters["keep"].annotation.__metadata__[0]
    assert "--keep/--no-keep" in (info.default, *info.param_decls)  # Typer first takes one for a default


def test_a_progress_that_there_is_not_is_refused(family: dict[str, Path], basis: Basis) -> None:
    refused = basis("diff", family["a"], family["b"], "--progress", "xml")
    assert refused.exit_code == 2 and "--progress xml" in refused.stderr and "bar, json" in refused.stderr


@pytest.mark.parametrize("parameters", [3, [3], [("density", 0.3)], "density"])
def test_parameters_that_are_none_are_refused(family: dict[str, Path], tmp_path: Path, parameters: Any) -> None:
    with pytest.raises(basiscli.UsageError, match="not a parameter"):
        basiscli.plan_merge([family["a"], family["b"]], method="ties", base=family["base"], parameters=parameters)
    recipe = {"steps": [{"merge": [str(family["a"])], "method": "ties", "parameters": parameters}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = basis_process("run", tmp_path / "recipe.yaml", "--dry-run")
    assert done.returncode in (2, 3) and "not a parameter" in done.stderr


def test_one_parameter_is_a_string(family: dict[str, Path]) -> None:
    plan = basiscli.plan_merge([family["a"]], method="ties", base=family["base"], parameters="density=0.25")
    assert plan.parameters["density"] == 0.25


@pytest.mark.parametrize("wrong", [{"plugin": "x.py"}, {"plugins": "x.py"}])
def test_an_option_by_its_other_name_is_refused_like_itself(family: dict[str, Path], wrong: dict[str, Any]) -> None:
    with pytest.raises(basiscli.UsageError, match="plugins: input should be a valid list"):
        basiscli.plan_merge([family["a"]], method="linear", **wrong)


def test_a_package_that_ends_the_process_is_a_warning(tmp_path: Path) -> None:
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[basis.command]\nbroken = leaves:command\n")
    done = basis_process("--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "command 'broken' of broken does not load" in done.stderr
