"""The experiments on finished runs as plain Ray tasks, submitted by the driver.

A task reads its images from the object store and its checkpoints once a worker, and writes its own
results. Only so many are in Ray's hands at once, so neither Ray nor the driver grows with their number.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from memlib.checkpoints import CheckpointFolder
from memlib.datasets import Dataset
from memlib.prefixes import State
from memlib.results import open_results
from memlib.tasks import perform_task, record_unit_failure
from memlib.units import Task
from sweeps.cluster import Capacity
from sweeps.failures import RESTARTS, describe_error, record
from sweeps.object_store import from_arrays
from sweeps.preflight import dataset_key
from sweeps.progress import SweepProgress
from sweeps.resources import Resources, task_resources

IN_FLIGHT_PER_LANE = 2  # tasks given to Ray for each that can run at once: the next one starts without the driver


Work = Callable[[Task, Dataset, str, torch.device], None]  # a task, its images, the results and where to compute


@dataclass(frozen=True)
class TaskFailure:
    """A task that did not end well, and why."""

    task: Task
    error: str


class TaskPool:
    """Tasks that wait, that Ray works on, and that failed.

    images: object store references by `dataset_key`. results: the store's location, reachable from every node.
    work: what a worker does with a task; default: an experiment on a finished run.
    """

    def __init__(
        self,
        images: Mapping[str, ray.ObjectRef],
        results: str,
        capacity: Capacity,
        progress: SweepProgress,
        work: Work | None = None,
    ) -> None:
        self.failures: list[TaskFailure] = []
        self._images = images
        self._results = results
        self._capacity = capacity
        self._progress = progress
        self._work = work or _experiment
        self._waiting: deque[Task] = deque()
        self._running: dict[ray.ObjectRef, Task] = {}

    def add(self, tasks: Iterable[Task]) -> None:
        """Take tasks on; they are submitted by `advance`."""
        tasks = list(tasks)
        self._waiting.extend(tasks)
        self._progress.tasks_added(tasks)
        self.advance()

    def advance(self, *, seconds: float = 0.0) -> None:
        """Take note of what has ended, waiting up to `seconds` for it, and submit what there is room for."""
        if self._running:
            ended, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            if not ended and seconds > 0:
                ended, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
            for reference in ended:
                self._take_note(reference, self._running.pop(reference))
        while self._waiting and len(self._running) < self._room(self._waiting[0]):
            task = self._waiting.popleft()
            self._running[self._submit(task)] = task

    def finish(self) -> None:
        """Work until nothing waits or runs."""
        while self._waiting or self._running:
            self.advance(seconds=1.0)

    def _room(self, task: Task) -> int:
        wanted = task_resources(task.run, self._capacity)
        lanes = self._capacity.gpus / wanted.gpu if wanted.gpu else self._capacity.cpus / wanted.cpus
        return max(1, int(lanes * IN_FLIGHT_PER_LANE))

    def _submit(self, task: Task) -> ray.ObjectRef:
        wanted = task_resources(task.run, self._capacity)
        remote = _perform.options(num_cpus=wanted.cpus, num_gpus=wanted.gpu, max_retries=RESTARTS)
        return remote.remote(self._work, task, self._images[dataset_key(task.run)], self._results, wanted)

    def _take_note(self, reference: ray.ObjectRef, task: Task) -> None:
        try:
            error = ray.get(reference)
        except RayError as lost:
            error = f"its process was lost {RESTARTS + 1} times or could not be started ({type(lost).__name__}: {lost})"
            error = record(
                lambda store: record_unit_failure(task, store, device=None, error=error), self._results, error
            )
        if error is not None:
            self.failures.append(TaskFailure(task, error))
        self._progress.task_ended(task, error)


@ray.remote
def _perform(work: Work, task: Task, images: dict[str, Any], results: str, granted: Resources) -> str | None:
    """Perform a task on a worker; return None, or the reason of a failure of its own, which is not tried again."""
    device = torch.device("cuda" if granted.gpu else "cpu")
    torch.set_num_threads(granted.cpus)
    try:
        work(task, from_arrays(images), results, device)
    except RayError:
        raise
    except Exception as error:
        reason = describe_error(error)
        return record(lambda store: record_unit_failure(task, store, device=device, error=reason), results, reason)
    return None


def _experiment(task: Task, dataset: Dataset, results: str, device: torch.device) -> None:
    load_state = functools.partial(_load_state, results, task.run.run_id)
    perform_task(task, dataset, open_results(results), device=device, load_state=load_state)


@functools.lru_cache(maxsize=16)
def _load_state(results: str, run_id: str, epoch: int) -> State:
    """Return a checkpoint, read once a worker process as long as it stays among the last 16."""
    return CheckpointFolder(open_results(results).storage, run_id).load_epoch(epoch)
