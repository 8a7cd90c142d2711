"""The Ray engine: runs a plan's tasks on a cluster whose machines share the file system of inputs and output.

The driver is where the command was given: it plans, keeps the journal, shows the progress, and hands out tasks. A
worker is one process of the cluster. With its first task it makes the same plan, opens the shards for writing and
builds runs like the driver's; a task is then the call of one of the run's methods with plain arguments, and its result
the journal's entry. What a worker wrote is on the shared disk before its entry is returned, so with a worker no more is
lost than the task that it was at.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray import ObjectRef, exceptions

from basiscli.checkpoints.shards import Shards
from basiscli.engine.batches import do_task
from basiscli.engine.partial import Plan
from basiscli.engine.settings import Cluster, default_workers
from basiscli.engine.tasks import Task, largest_first
from basiscli.engine.threads import Threads
from basiscli.errors import BasisError, InputError, ResourceError, UsageError
from basiscli.progress import Progress, Silent

RETRIES = 3
"""How often a task is given to another worker when its own is lost."""
_PROCESS_BYTES = 1 << 29  # a worker's memory besides its task's: the interpreter, torch, the plan
_GRACE = 10  # seconds that tasks get to stop before their processes are ended
_STORE_BYTES = 100_000_000  # Ray's store of shared objects, which holds nothing of ours
_CACHES = ("BASIS_CACHE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")  # where what came from the Hub lies
_LOST = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.OutOfMemoryError,  # Ray ended the process before the machine ran out of memory
    exceptions.ObjectLostError,
)


@dataclass(frozen=True)
class Job:
    """What a worker needs to run tasks of a run; pickled with every task."""

    id: str
    """Unique to this run of the driver."""
    plan: Callable[[], Plan]
    fingerprint: str
    run: type
    """Built from a plan, an output, a progress display, a device and an engine; its methods do the tasks."""
    device: str
    folder: Path
    """Working directory of the driver, which relative paths start from."""
    environment: Mapping[str, str]
    """Variables that the worker sets: where the Hub's cache is."""


@contextmanager
def connected(cluster: Cluster, plan: Plan, device: torch.device) -> Iterator[RayEngine]:
    """Connect to the cluster, or start one on this machine; yield the engine and disconnect at the end.

    A connection that the process already has is used and left open.

    Raises:
        UsageError: no cluster answers at that address.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(cluster)
    engine = RayEngine(cluster, plan, device)
    try:
        yield engine
    finally:
        if ours:
            ray.shutdown()


@dataclass
class RayEngine:
    """Runs tasks on the workers of the Ray cluster that this process is connected to; see `Engine`."""

    cluster: Cluster
    plan: Plan
    device: torch.device
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """By which workers tell one run from the next."""
    lost: Counter[str] = field(default_factory=Counter)
    """How many workers were lost at each task, by its key."""

    def run_tasks(
        self,
        tasks: Sequence[Task],
        do: Callable[..., dict[str, Any]],
        record: Callable[[str, dict[str, Any]], None],
        *,
        progress: Progress,
        what: str,
    ) -> None:
        """Run tasks and record each as it ends; see `Engine.run_tasks`. Workers call `do` on a run of their own.

        Raises:
            ResourceError: a task lost more than `RETRIES` workers, or the cluster failed.
        """
        job = self._job(do)
        waiting, running = deque(largest_first(tasks)), dict[ObjectRef, Task]()
        progress.start(what, len(tasks), sum(task.size for task in tasks))
        try:
            while waiting or running:
                while waiting and len(running) < self._most():
                    task = waiting.popleft()
                    running[self._submit(job, do.__name__, task)] = task
                for ref in ray.wait(list(running), timeout=None)[0]:
                    task = running.pop(ref)
                    entries = self._entries(ref, task)
                    if entries is None:
                        waiting.appendleft(task)
                        progress.note(f"workers lost: {self.lost.total()}")
                        continue
                    for key, entry in entries.items():
                        record(key, entry)
                    progress.advance(task.size)
        except BaseException:
            _cancel(list(running))
            raise

    def _job(self, do: Callable[..., Any]) -> Job:
        run = do.__self__  # type: ignore[attr-defined]
        environment = {name: os.environ[name] for name in _CACHES if name in os.environ}
        # What the driver has resolved is in the cache; a worker that asked the Hub again might find another revision.
        environment["HF_HUB_OFFLINE"] = "1"
        return Job(
            self.id, self.cluster.plan, self.plan.fingerprint, type(run), str(self.device), Path.cwd(),
            environment,
        )  # fmt: skip

    def _most(self) -> int:
        """Return how many tasks may be handed out: enough that no processor waits for this process."""
        return self.cluster.workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def _submit(self, job: Job, method: str, task: Task) -> ObjectRef:
        # More than any machine has would never be scheduled: better to try, as the local engine does.
        room = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        options: dict[str, Any] = {"memory": min(task.workspace + _PROCESS_BYTES, room)}
        if self.device.type == "cuda":
            options["num_gpus"] = 1
        return _REMOTE.options(name=task.key, **options).remote(job, method, task)

    def _entries(self, ref: ObjectRef, task: Task) -> dict[str, dict[str, Any]] | None:
        """Return what the journal is to hold of a task, or None if its worker was lost and it may be tried again."""
        try:
            entries: dict[str, dict[str, Any]] = ray.get(ref)
        except _LOST as error:
            self.lost[task.key] += 1
            if self.lost[task.key] <= RETRIES:
                self.plan.notes.append(f"a worker was lost at {task.key}, and another did it")
                return None
            raise ResourceError(
                f"{self.lost[task.key]} workers were lost at this: {str(error).splitlines()[0]}",
                tensor=task.key,
                remedy="mend the cluster, or give it more memory; the same command goes on where this one stopped",
            ) from error
        except exceptions.RayTaskError as error:
            raise error.cause from error  # as the task raised it on its machine
        except exceptions.RayError as error:
            raise ResourceError(
                f"the Ray cluster failed: {str(error).splitlines()[0]}",
                remedy="mend it; the same command goes on where this one stopped",
            ) from error
        return entries


# On a worker ----------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """A worker's own plan, shards and runs of the job whose tasks it runs."""

    job_id: str
    plan: Plan
    shards: Shards
    runs: dict[type, Any] = field(default_factory=dict)
    """Whose methods are the tasks, as tasks ask for them."""


_part: _Part | None = None


def _do(job: Job, method: str, task: Task) -> dict[str, dict[str, Any]]:
    """Do one task of a job."""
    run = _run_of(job)
    entries = do_task(getattr(run, method), task)
    run.output.sync()
    return entries


_REMOTE = ray.remote(num_cpus=1, max_retries=0)(_do)  # `RayEngine` gives tasks of lost workers to others


def _run_of(job: Job) -> Any:
    global _part
    if _part is None or _part.job_id != job.id:
        if _part is not None:
            ended, _part = _part, None  # first: a task that is cancelled here must not leave a part that is half closed
            ended.shards.close()
            ended.plan.close()
        _part = _take_up(job)
    if job.run not in _part.runs:
        _part.runs[job.run] = job.run(_part.plan, _part.shards, Silent(), torch.device(job.device), Threads(1))
    return _part.runs[job.run]


def _take_up(job: Job) -> _Part:
    """Make the plan of a job, and open what it writes.

    Raises:
        InputError: this machine does not see the files that the driver sees.
    """
    os.environ.update(job.environment)
    torch.set_num_threads(1)  # as the local engine's tasks; other sums would be other bytes
    host = os.uname().nodename
    try:
        os.chdir(job.folder)
        plan = job.plan()
        same = plan.fingerprint == job.fingerprint
    except (OSError, BasisError) as error:
        raise InputError(f"on {host}: {str(error).splitlines()[0]}", file=job.folder, remedy=_SHARE) from error
    if not same:
        plan.close()
        raise InputError(f"{host} sees other files, or has another version of basis", remedy=_SHARE)
    try:
        shards = Shards.join(plan.out, plan.layout, plan.fingerprint)
    except (OSError, ValueError) as error:
        raise InputError(f"{host} does not see the partial output", file=plan.out, remedy=_SHARE) from error
    return _Part(job.id, plan, shards)


_SHARE = "every machine needs the models, the output and the same basis, on a shared file system under the same paths"


# The cluster ----------------------------------------------------------------------------------------------------------


def _connect(cluster: Cluster) -> None:
    quiet = {"configure_logging": False, "log_to_driver": False}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        count = cluster.workers or default_workers()
        ray.init("local", num_cpus=count, include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
        return
    try:
        host, _, port = address.rpartition("/")[2].rpartition(":")
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_GRACE).close()
        ray.init(address, **quiet)
    except (OSError, ValueError, OverflowError, exceptions.RayError) as error:
        raise UsageError(
            f"no Ray cluster at {address}: {str(error).splitlines()[0]}",
            remedy="`ray status` tells whether it runs; without --ray-address one is started on this machine",
        ) from error


def _cancel(running: list[ObjectRef]) -> None:
    """Stop tasks, and return when none is writing any more."""
    for force in (False, True):
        for ref in running:
            with suppress(exceptions.RayError):
                ray.cancel(ref, force=force)
        if running:
            with suppress(exceptions.RayError):
                _, running = ray.wait(running, num_returns=len(running), timeout=_GRACE)
