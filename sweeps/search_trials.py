"""The trials of a search on Ray Tune: asynchronous successive halving stops the bad ones early.

A trial reports what it gets right of its held-out examples, and nothing else. One that is stopped is
concluded by a task of its own: Tune ends a trial where it reports.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from memlib.checkpoints import CheckpointFolder
from memlib.config import RunConfig, config_from_json
from memlib.datasets import Dataset
from memlib.results import ResultStore
from memlib.tasks import record_unit
from memlib.trials import TABLE, conclude_trial, perform_trial, trial_unit
from memlib.units import Task
from sweeps.cluster import Capacity
from sweeps.failures import open_patiently, record
from sweeps.object_store import from_arrays
from sweeps.preflight import dataset_key
from sweeps.progress import SweepProgress
from sweeps.resources import task_resources
from sweeps.search_plan import Search
from sweeps.training_runs import Watcher, fit_trials, report_epoch, report_note, work_in_trial
from sweeps.unit_tasks import TaskPool


class Halving(ASHAScheduler):
    """Tune's successive halving over epochs, by validation accuracy, for a search that may have begun before.

    Controls without dropout neither count nor are stopped, and no trial is stopped after its last epoch.
    Trials that are done already count as if they had just reported their curves.
    """

    def __init__(self, search: Search) -> None:
        plan = search.plan
        super().__init__(
            time_attr="epoch",
            metric="accuracies/validation",
            mode="max",
            max_t=plan.epochs,
            grace_period=plan.grace,
            reduction_factor=plan.space.reduction,
            stop_last_trials=False,
        )
        self.stopped: set[str] = set()
        for run_id, curve in search.curves.items():
            self._count(run_id, curve)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:  # noqa: ANN401
        """Return whether the trial goes on after this epoch."""
        run = config_from_json(trial.config["config"])
        if run.dropout.kind == "none":
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP and result["epoch"] < run.training.epochs:
            self.stopped.add(run.run_id)
            return decision
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:  # noqa: ANN401
        """Take note that a trial has ended; all it reported is counted already."""

    def _count(self, run_id: str, curve: Sequence[float]) -> None:
        done: Any = SimpleNamespace(trial_id=run_id)
        controller: Any = None
        self.on_trial_add(controller, done)
        for epoch, share in enumerate(curve):
            super().on_trial_result(controller, done, {"epoch": epoch, "accuracies/validation": share})


def run_search(
    search: Search,
    images: Mapping[str, ray.ObjectRef],
    *,
    results: str,
    capacity: Capacity,
    progress: SweepProgress,
) -> list[tuple[RunConfig, str]]:
    """Perform the runs of a search on Ray and return those that failed and why; each writes its own result.

    images: object store references by `dataset_key`. results: the store's location, reachable from every node.
    """
    halving = Halving(search)
    pool = TaskPool(images, results, capacity, progress, work=_conclude)

    def ended(run: RunConfig) -> None:
        if run.run_id in halving.stopped:
            pool.add([Task((trial_unit(run),))])

    failures = fit_trials(
        search.to_do,
        tune.with_parameters(_search_trial, datasets=dict(images), results=results),
        Watcher(progress, ended=ended, idle=pool.advance),
        resources=lambda run: task_resources(run, capacity),
        record_lost=functools.partial(_record_lost, results),
        scheduler=halving,
    )
    pool.finish()
    return [(f.run, f.error) for f in failures] + [(f.task.run, f.error) for f in pool.failures]


def _search_trial(trial: dict[str, str], *, datasets: dict[str, Any], results: str) -> None:
    """Perform one trial of the search in a Tune trial; an error of its own is recorded and not tried again."""

    def work(run: RunConfig, device: torch.device) -> None:
        store = open_patiently(results, report_note)
        rows = store.rows_of(TABLE, trial_unit(run).unit_id)
        if rows and not rows[0]["stopped_early"]:  # its process was lost after its last line, or just before
            CheckpointFolder(store.storage, trial_unit(run).unit_id).delete_last()
            return
        dataset = from_arrays(ray.get(datasets[dataset_key(run)]))
        perform_trial(run, dataset, store, device=device, on_epoch=report_epoch)

    work_in_trial(trial, work, lambda run, device, error: _record(results, run, device, error))


def _conclude(task: Task, dataset: Dataset, store: ResultStore, device: torch.device) -> None:
    conclude_trial(task.run, dataset, store, device=device)


def _record_lost(results: str, run: RunConfig, error: str) -> str:
    return _record(results, run, None, error)


def _record(results: str, run: RunConfig, device: torch.device | None, error: str) -> str:
    return record(
        lambda store: record_unit(trial_unit(run), store, device=device, seconds=None, error=error), results, error
    )
