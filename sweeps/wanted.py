"""Wanted minus done: what a sweep still has to compute, from the store alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from memlib.config import RunConfig
from memlib.experiments import ExperimentsConfig
from memlib.holdings import holdings, is_finished
from memlib.results import ResultStore
from memlib.tasks import asks_for_groups, done_units, plan_tasks
from memlib.units import Task, missing_tasks
from sweeps.plan import EXPERIMENTS
from sweeps.preflight import load_datasets, network_groups


@dataclass(frozen=True)
class ToDo:
    """Runs to train, and tasks on the runs that are finished already.

    repeated: those of `runs` that were done before, and lack a state or a table or are being trained again.
    """

    runs: list[RunConfig]
    tasks: list[Task]
    repeated: tuple[RunConfig, ...] = ()


def still_to_do(wanted: Mapping[RunConfig, ExperimentsConfig], store: ResultStore, root: Path | None = None) -> ToDo:
    """Return what the store does not hold yet; `root` is where images are, should they be needed to tell.

    Raises:
        InputError: an experiment asks for a layer group or a checkpoint that a finished run does not have, or
            a result file is damaged.
    """
    held = holdings(store)
    runs = [run for run in wanted if not is_finished(run, held)]
    unfinished = {run.run_id for run in runs}
    trained = {run: experiments for run, experiments in wanted.items() if run.run_id not in unfinished}
    names = _group_names(store, [run for run, asked in trained.items() if asks_for_groups(asked)], root)
    tasks = [task for run, asked in trained.items() for task in plan_tasks(run, asked, names.get(run, ()))]
    repeated = tuple(run for run in runs if run.run_id in held.done)
    return ToDo(runs, missing_tasks(tasks, done_by_experiment(store)), repeated)


def done_by_experiment(store: ResultStore) -> dict[str, set[str]]:
    """Return the ids of the units that are done, by experiment."""
    return {name: done_units(store, name) for name in EXPERIMENTS}


def _group_names(store: ResultStore, runs: Sequence[RunConfig], root: Path | None) -> dict[RunConfig, tuple[str, ...]]:
    """Return the layer groups of finished runs, by depth: as their gradients name them, else as their network does."""
    rows = store.read("gradients", columns=["run_id", "group", "group_index"])
    rows = rows.filter(pc.field("run_id").isin(pa.array(sorted(run.run_id for run in runs), pa.string())))
    groups = rows.group_by(["run_id", "group", "group_index"]).aggregate([]).sort_by("group_index").to_pylist()
    recorded = defaultdict[str, list[str]](list)
    for row in groups:
        recorded[row["run_id"]].append(row["group"])
    unaccounted = [run for run in runs if run.run_id not in recorded]
    built = network_groups(unaccounted, load_datasets(unaccounted, root))
    return {run: built[run] if run in built else tuple(recorded[run.run_id]) for run in runs}
