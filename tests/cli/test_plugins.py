"""Methods of one's own: a package, a file, and what goes wrong with either."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import basiscli
from basiscli.registry import Registry
from tests.conftest import basis_process, read_checkpoint

Basis = Callable[..., Result]
EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin-mean"
MEDIAN = """
from basiscli import transform
import torch

@transform("merge", elementwise=True)
def median(others, *, power: int = 1):
    \"\"\"Element by element the median.\"\"\"
    return torch.stack(others).median(0).values ** power
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example package into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder, EXAMPLE], check=True, capture_output=True)
    return folder


def test_the_example_package_installs_and_merges(installed: Path, family: dict[str, Path], tmp_path: Path) -> None:
    words = ["merge", family["a"], family["b"], "--base", family["base"], "-m", "mean", "-o", tmp_path / "out"]
    done = basis_process(*words, "-p", "keep_base=false", PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    a, b = read_checkpoint(family["a"]), read_checkpoint(family["b"])
    for name, tensor in read_checkpoint(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    assert "mean" in basis_process("methods", PYTHONPATH=str(installed)).stdout


def test_two_plugins_of_one_name_are_an_error_that_names_both(installed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugins\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[basis.merge]\nmean = nowhere:mean\n")
    done = basis_process("methods", "show", "mean", PYTHONPATH=f"{installed}:{tmp_path}")
    assert done.returncode == 2
    assert "basis-plugin-mean" in done.stderr
    assert "other-plugins" in done.stderr


def test_a_broken_plugin_is_one_line_of_warning(tmp_path: Path) -> None:
    broken = tmp_path / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[basis.merge]\nbroken = nowhere:method\n")
    done = basis_process("methods", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert "ortho" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "plugin 'broken' of broken does not load" in done.stderr


def test_a_file_can_be_tried_out(family: dict[str, Path], tmp_path: Path, basis: Basis) -> None:
    file = tmp_path / "median.py"
    file.write_text(MEDIAN)
    words = ["merge", *(family[n] for n in "abc"), "-m", "median", "-o", tmp_path / "out", "--plugin", file]
    assert basis(*words).exit_code == 0
    stacked = [read_checkpoint(family[n])["model.norm.weight"] for n in "abc"]
    assert torch.equal(read_checkpoint(tmp_path / "out")["model.norm.weight"], torch.stack(stacked).median(0).values)
    refused = basis(*words, "-p", "power=much")
    assert refused.exit_code == 2
    assert "power" in refused.stderr


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import nosuchmodule", "does not load"),
        ("x = 1", "defines no transform"),
        (
            'from basiscli import transform\n@transform("merge")\ndef f(model): "Bad."',
            "its own parameters are keyword-only",
        ),
    ],
)
def test_a_file_that_is_no_plugin_is_refused(tmp_path: Path, source: str, complaint: str) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(source)
    with pytest.raises(basiscli.UsageError, match=complaint):
        Registry.with_files([file])


def test_nothing_is_loaded_from_the_current_folder_or_a_checkpoint(family: dict[str, Path], tmp_path: Path) -> None:
    for folder in (tmp_path, family["a"]):
        (folder / "sitecustomize.py").write_text("open('was-run', 'w')")
        (folder / "modeling.py").write_text("open('was-run', 'w')")
    done = subprocess.run(
        [Path(sys.executable).with_name("basis"), "merge", "a", "b", "-m", "linear", "-o", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("was-run"))
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_seed_depends_on_the_name_and_not_on_the_order(family: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "noise.py"
    file.write_text(
        "import torch\nfrom basiscli import transform\n"
        '@transform("merge")\n'
        "def noise(others, seed):\n"
        '    "The first model and noise."\n'
        "    return others[0] + torch.randn(others[0].shape, generator=torch.Generator().manual_seed(seed))\n"
    )
    digests = {}
    for workers, seed in ((1, 0), (4, 0), (1, 1)):
        result = basiscli.merge(
            [family["a"], family["b"]], method="noise", plugins=[file], seed=seed, workers=workers,
            output=tmp_path / f"{workers}-{seed}",
        )  # fmt: skip
        digests[workers, seed] = result.report.weights_digest
    assert digests[1, 0] == digests[4, 0] != digests[1, 1]


def test_a_result_of_another_shape_is_refused(family: dict[str, Path], tmp_path: Path, basis: Basis) -> None:
    file = tmp_path / "flat.py"
    file.write_text(
        "from basiscli import transform\n"
        '@transform("merge")\n'
        "def flat(others):\n"
        '    "All in a row."\n'
        "    return others[0].reshape(-1).repeat(2)\n"
    )
    result = basis("merge", family["a"], family["b"], "-m", "flat", "-o", tmp_path / "out", "--plugin", file)
    assert result.exit_code == 1
    assert "flat made [" in result.stderr
    assert "tensor:" in result.stderr
    assert not (tmp_path / "out").exists()
