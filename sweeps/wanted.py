"""Wanted minus done: what a sweep still has to compute, from the store alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from memlib.checkpoints import kept_epochs
from memlib.config import RunConfig
from memlib.experiments import ExperimentsConfig
from memlib.results import ResultStore
from memlib.runs import is_finished
from memlib.tasks import plan_tasks
from memlib.units import Task, missing_tasks
from sweeps.plan import EXPERIMENTS


@dataclass(frozen=True)
class ToDo:
    """Runs to train, and tasks on the runs that are finished already."""

    runs: list[RunConfig]
    tasks: list[Task]


def still_to_do(wanted: Mapping[RunConfig, ExperimentsConfig], store: ResultStore) -> ToDo:
    """Return what the store does not hold yet.

    Raises:
        InputError: an experiment asks for a layer group or a checkpoint that a finished run does not have, or
            a result file is damaged.
    """
    finished, kept = store.finished_runs(), kept_epochs(store.storage)
    runs = [run for run in wanted if not is_finished(run, store, finished, kept)]
    unfinished = {run.run_id for run in runs}
    trained = {run: experiments for run, experiments in wanted.items() if run.run_id not in unfinished}
    names = _group_names(store, {run.run_id for run in trained})
    tasks = [task for run, asked in trained.items() for task in plan_tasks(run, asked, names[run.run_id])]
    return ToDo(runs, missing_tasks(tasks, done_units(store)))


def done_units(store: ResultStore) -> dict[str, set[str]]:
    """Return the ids of the units that are done, by experiment."""
    return {experiment: store.units(experiment) for experiment in EXPERIMENTS}


def _group_names(store: ResultStore, run_ids: set[str]) -> dict[str, tuple[str, ...]]:
    """Return the layer groups of finished runs, by depth, as their gradients name them."""
    rows = store.read("gradients", columns=["run_id", "group", "group_index"])
    rows = rows.filter(pc.field("run_id").isin(pa.array(sorted(run_ids), pa.string())))
    groups = rows.group_by(["run_id", "group", "group_index"]).aggregate([]).sort_by("group_index").to_pylist()
    names: dict[str, list[str]] = {run_id: [] for run_id in run_ids}
    for row in groups:
        names[row["run_id"]].append(row["group"])
    return {run_id: tuple(ordered) for run_id, ordered in names.items()}
