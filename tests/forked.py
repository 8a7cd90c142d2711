"""Processes forked from one that has imported what a command imports, for which a new interpreter takes seconds.

`python -m tests.forked FD` is that process: it does nothing but import, so that no thread of it is lost in a fork.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
LIMIT = 1 << 20
"""Bytes of a message; the words and environment of a command are a few thousand."""
AT_WORK = re.compile(
    "BASIS_CACHE|HF_HUB_DISABLE_PROGRESS_BARS|PYTEST_CURRENT_TEST|PYTHONBREAKPOINT|RAY_.*|TORCHINDUCTOR_CACHE_DIR"
)
"""Variables that are read only when a command works, or that libraries set; others may be read at an import."""


# In the tests ---------------------------------------------------------------------------------------------------------


class Forked:
    """A process that does what `python ARGUMENTS` does, as `subprocess.Popen` has it with both outputs captured."""

    def __init__(self, arguments: list[str], cwd: Path | None, env: dict[str, str]) -> None:
        self.args, self.returncode = arguments, None
        self._outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        files = [file.fileno() for file in self._outputs]
        self.pid = _asked({"arguments": arguments, "cwd": str(cwd or Path.cwd()), "env": env}, files)
        self._ended = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._status(0)

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what it printed when it has ended, or end it after so many seconds."""
        if late := self._status(timeout) is None:
            os.kill(self.pid, signal.SIGKILL)
            self._status(None)
        printed = []
        for file in self._outputs:
            file.seek(0)
            printed.append(file.read().decode())
            file.close()
        if late:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, *printed)
        return printed[0], printed[1]

    def _status(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            ended = select.poll()
            ended.register(self._ended, select.POLLIN)
            if ended.poll(None if timeout is None else 1000 * timeout):
                os.close(self._ended)
                self.returncode = _asked({"ended": self.pid})
        return self.returncode


def can_fork(env: dict[str, str]) -> bool:
    """Whether nothing that was read when the modules were imported would be read otherwise now."""
    return hasattr(os, "pidfd_open") and not different(env)


def different(env: Mapping[str, str]) -> set[str]:
    """Return the names of the variables that are not what they were when the modules were imported."""
    return {name for name, _ in _settings(env).items() ^ SETTINGS.items()}


def _settings(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if not AT_WORK.fullmatch(name)}


SETTINGS = _settings(os.environ) | {"HF_HUB_OFFLINE": "1"}
"""What every test begins with."""


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
            cwd=ROOT, env=SETTINGS | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return ours, process  # kept: one that is forgotten while it runs is a warning


def _asked(message: dict[str, Any], files: list[int] | None = None) -> int:
    calls, _ = _server()
    socket.send_fds(calls, [json.dumps(message).encode()], files or [])
    answer = calls.recv(LIMIT)
    assert answer, "the process that has the imports has ended"
    return int(answer)


# In the process that has the imports ----------------------------------------------------------------------------------


def _import() -> None:
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import basiscli
    from basiscli.app import app  # noqa: F401

    for name in basiscli.__all__:
        getattr(basiscli, name)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in the forks"  # noqa: PTH208
    gc.collect()
    gc.freeze()  # so that no collection in a fork copies what they share
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # free memory here would hide as much use in a fork whose peak is measured


def _serve(calls: socket.socket) -> dict[str, Any]:
    """Fork for every call; return in each of the forks, with what it shall do."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Ctrl-C is for the tests, whose end ends this
    while message := socket.recv_fds(calls, LIMIT, 2):
        text, files, *_ = message
        if not text:
            break
        call = json.loads(text)
        if "ended" in call:
            answer = os.waitstatus_to_exitcode(os.waitpid(call["ended"], 0)[1])
        elif answer := os.fork():
            for file in files:
                os.close(file)
        else:
            calls.close()
            return call | {"files": files}
        calls.send(str(answer).encode())
    sys.exit()


def _become(call: dict[str, Any]) -> None:
    """Turn this fork into `python ARGUMENTS`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    for number, file in enumerate(call["files"], start=1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(call["env"])
    os.chdir(call["cwd"])
    option, what, *words = call["arguments"]
    if option == "-m":
        sys.path[0], sys.argv = call["cwd"], [what, *words]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = "", [option, *words]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _end(status: int) -> NoReturn:
    """End as the interpreter does, but leave the modules to the system: taking them down takes most of a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as to_the_tests:
        _import()
        asked = _serve(to_the_tests)
    try:
        _become(asked)
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        _end(end.code or 0)
    _end(0)
