"""The experiments on finished runs as plain Ray tasks, submitted by the driver.

A task reads its images from the object store and its checkpoints once a worker, and writes its own
results. Only so many are in Ray's hands at once, so neither Ray nor the driver grows with their number.
What loses its process or node is submitted again by the driver, which says so; Ray would do it in silence.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import LocalRayletDiedError, RayError, RayTaskError, RuntimeEnvSetupError

from memlib.checkpoints import Checkpoint, CheckpointFolder
from memlib.datasets import Dataset
from memlib.results import ResultStore
from memlib.tasks import done_units, perform_task, record_unit_failure
from memlib.units import Task, missing_tasks
from sweeps.cluster import Capacity
from sweeps.equipment import check_code
from sweeps.failures import RESTARTS, RayDied, describe_error, describe_loss, open_patiently, record
from sweeps.machines import MachineWatch
from sweeps.object_store import from_arrays
from sweeps.preflight import dataset_key
from sweeps.progress import SweepProgress
from sweeps.resources import Resources, task_resources

GIVE_UP_AFTER = 5  # tasks of one experiment on one run that fail of themselves, one after the other: a bug
IN_FLIGHT_PER_LANE = 2  # tasks given to Ray for each that can run at once: the next one starts without the driver


Work = Callable[
    [Task, Dataset, ResultStore, torch.device], None
]  # a task, its images, the results and where to compute


@dataclass(frozen=True)
class TaskFailure:
    """A task that did not end well, and why."""

    task: Task
    error: str


@dataclass(frozen=True)
class Attempt:
    """A task in Ray's hands for the `number`th time, from 1; `left` is what of it is not done yet."""

    task: Task
    left: Task
    number: int = 1


@dataclass(frozen=True)
class Outcome:
    """How a task's process ended: the reason of a failure of its own, and what it had to say."""

    error: str | None
    notes: tuple[str, ...] = ()


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
        self._waiting: deque[Attempt] = deque()
        self._running: dict[ray.ObjectRef, Attempt] = {}
        self._failed_in_a_row = Counter[tuple[str, str]]()  # by experiment and run
        self._machines = MachineWatch(capacity, progress.say)

    def add(self, tasks: Iterable[Task]) -> None:
        """Take tasks on; they are submitted by `advance`."""
        tasks = list(tasks)
        self._waiting.extend(Attempt(task, task) for task in tasks)
        self._progress.tasks_added(tasks)
        self.advance()

    def advance(self, *, seconds: float = 0.0) -> None:
        """Take note of what has ended, waiting up to `seconds` for it, and submit what there is room for.

        Called all the time while a sweep works, it also says when the cluster has no machine.
        """
        self._machines.look()
        if self._running:
            ended, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            if not ended and seconds > 0:
                ended, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
            for reference in ended:
                self._take_note(reference, self._running.pop(reference))
        while self._waiting and len(self._running) < self._room(self._waiting[0].task):
            attempt = self._waiting.popleft()
            self._running[self._submit(attempt.left)] = attempt

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
        remote = _perform.options(num_cpus=wanted.cpus, num_gpus=wanted.gpu, max_retries=0)
        return remote.remote(self._work, task, self._images[dataset_key(task.run)], self._results, wanted)

    def _take_note(self, reference: ray.ObjectRef, attempt: Attempt) -> None:
        task = attempt.task
        try:
            outcome = ray.get(reference)
        except LocalRayletDiedError as died:
            raise RayDied("Ray died on the machine this command runs on") from died
        except RayError as lost:
            if attempt.number <= RESTARTS and _may_be_repeated(lost):
                self._progress.task_lost(task, describe_loss(str(lost)), f"{attempt.number} of {RESTARTS}")
                self._repeat(attempt)
                return
            reason = f"it was started {attempt.number} times and lost its process or node ({lost})"
            error = record(
                lambda store: record_unit_failure(task, store, device=None, error=reason), self._results, reason
            )
            outcome = Outcome(error)
        for note in outcome.notes:
            self._progress.task_note(task, note)
        self._progress.task_ended(task, outcome.error)
        subject = _subject(task)
        if outcome.error is None:
            self._failed_in_a_row[subject] = 0
            return
        self.failures.append(TaskFailure(task, outcome.error))
        self._failed_in_a_row[subject] += 1
        if self._failed_in_a_row[subject] == GIVE_UP_AFTER:
            self._give_up(subject)

    def _give_up(self, subject: tuple[str, str]) -> None:
        """Drop what waits of an experiment on a run: what failed so often would fail again."""
        dropped = [attempt.task for attempt in self._waiting if _subject(attempt.task) == subject]
        self._waiting = deque(attempt for attempt in self._waiting if _subject(attempt.task) != subject)
        if dropped:
            self._progress.gave_up(dropped, GIVE_UP_AFTER)

    def _repeat(self, attempt: Attempt) -> None:
        """Queue again what the lost process had not written yet."""
        store = open_patiently(self._results, lambda text: self._progress.task_note(attempt.task, text))
        done = {attempt.task.experiment: done_units(store, attempt.task.experiment)}
        for left in missing_tasks([attempt.left], done):
            self._waiting.appendleft(Attempt(attempt.task, left, attempt.number + 1))
            return
        self._progress.task_ended(attempt.task, None)


def _subject(task: Task) -> tuple[str, str]:
    return task.experiment, task.run.run_id


def _may_be_repeated(lost: RayError) -> bool:
    """Return whether another process or node may do better: not where the code cannot be loaded."""
    if isinstance(lost, RuntimeEnvSetupError):
        return False
    return not isinstance(lost, RayTaskError) or isinstance(lost.cause, RayError)


@ray.remote
def _perform(work: Work, task: Task, images: dict[str, Any], results: str, granted: Resources) -> Outcome:
    """Perform a task on a worker; a failure of its own is in the outcome, and not tried again."""
    device = torch.device("cuda" if granted.gpu else "cpu")
    torch.set_num_threads(granted.cpus)
    notes: list[str] = []
    try:
        check_code()
        work(task, from_arrays(images), open_patiently(results, notes.append), device)
    except RayError:
        raise
    except Exception as error:
        reason = describe_error(error)
        reason = record(lambda store: record_unit_failure(task, store, device=device, error=reason), results, reason)
        return Outcome(reason, tuple(notes))
    return Outcome(None, tuple(notes))


def _experiment(task: Task, dataset: Dataset, store: ResultStore, device: torch.device) -> None:
    load_checkpoint = functools.partial(_load_checkpoint, store.storage.uri, task.run.run_id)
    perform_task(task, dataset, store, device=device, load_checkpoint=load_checkpoint)


@functools.lru_cache(maxsize=16)
def _load_checkpoint(results: str, run_id: str, epoch: int) -> Checkpoint:
    """Return a checkpoint, read once a worker process as long as it stays among the last 16."""
    return CheckpointFolder(open_patiently(results, lambda text: None).storage, run_id).load_epoch(epoch)
