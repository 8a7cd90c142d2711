"""Forked processes are what new interpreters are, as far as a test can see."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import basis_process, new_interpreter, python_process
from tests.forked import Forked, can_fork, different

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
SEEN = "import os, sys; print(sys.argv, sys.path[0], os.getcwd(), sorted(os.environ), __name__); sys.stderr.write('é')"


def ended(start: Callable[..., Any], *words: str, cwd: Path) -> tuple[int | None, str, str]:
    process = start(*words, cwd=cwd)
    return (*process.communicate(timeout=60), process.returncode)


@pytest.mark.parametrize(
    "words",
    [
        ["-c", SEEN, "word"],
        ["-c", "raise SystemExit(7)"],
        ["-c", "raise SystemExit('no')"],
        ["-c", "import atexit; atexit.register(print, 'last'); print('first')"],
        ["-m", "basiscli", "merge", "--help"],
        ["-m", "basiscli", "nosuch"],
    ],
)
def test_a_fork_sees_and_says_what_a_new_interpreter_does(tmp_path: Path, words: list[str]) -> None:
    process = python_process("-c", "pass")
    process.communicate()
    assert isinstance(process, Forked), f"nothing is forked, as these differ: {different(os.environ)}"
    assert ended(python_process, *words, cwd=tmp_path) == ended(new_interpreter, *words, cwd=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    process = python_process("-c", "import time; print('begun', flush=True); time.sleep(60)")
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert process.poll() == -number


def test_what_is_read_at_an_import_makes_a_new_interpreter(tmp_path: Path) -> None:
    assert not can_fork(os.environ | {"HF_HOME": str(tmp_path)})
    assert not can_fork(os.environ | {"PYTHONPATH": str(tmp_path)})
    assert basis_process("--version", HF_HOME=str(tmp_path)).stdout == basis_process("--version").stdout
