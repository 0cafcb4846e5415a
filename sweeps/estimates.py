"""How long a sweep will take, from its FLOPs and measured throughputs: an estimate, not a promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memlib.config import RunConfig
from sweeps.throughput import Throughput

WORKER_SECONDS = 7.0  # until a Ray worker has imported what it needs; the first of a lane, for runs and for tasks
TASK_SECONDS = 0.1  # of a task, beside its FLOPs: its network, its checkpoints, its files
EPOCH_SECONDS = 0.02  # of an epoch, beside its FLOPs: the state to continue from


@dataclass(frozen=True)
class RunCost:
    """FLOPs (2 a multiply-add) of all passes, and of those in training steps; bytes of the checkpoints kept."""

    flops: float
    checkpoint_bytes: int
    training_flops: float = 0.0


@dataclass(frozen=True)
class Work:
    """The costs of a sweep's runs, and of its tasks with the run each is about."""

    runs: Mapping[RunConfig, RunCost]
    tasks: Sequence[tuple[RunConfig, RunCost]]


@dataclass(frozen=True)
class Rates:
    """Throughputs of the runs as they train, on all threads of each, and of the tasks on a run, on one."""

    runs: Mapping[RunConfig, Throughput]
    tasks: Mapping[RunConfig, Throughput]


def sweep_seconds(work: Work, rates: Rates, *, lanes: int) -> float:
    """Return the estimated wall time of the runs, then the tasks, on `lanes` threads or cards.

    Neither a run nor a task can be split, so the longest of each is a lower bound. It is also the time of runs that
    have several threads each: those are all under way at once.
    """
    runs = [run.training.epochs * EPOCH_SECONDS + seconds_of(cost, rates.runs[run]) for run, cost in work.runs.items()]
    tasks = [TASK_SECONDS + seconds_of(cost, rates.tasks[run]) for run, cost in work.tasks]
    trained = max(max(runs, default=0.0), sum(runs) / lanes)
    starts = WORKER_SECONDS * (bool(runs) + bool(tasks))
    return starts + trained + max(max(tasks, default=0.0), sum(tasks) / lanes)


def seconds_of(cost: RunCost, throughput: Throughput) -> float:
    """Return the seconds of all FLOPs; what is not training is float32, as every measurement is."""
    return cost.training_flops / throughput.training + (cost.flops - cost.training_flops) / throughput.evaluation
