"""The experiments on a finished run as tasks: settings, checkpoints and data in, tables in the store out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch

from memlib.checkpoints import CheckpointFolder, load_model_state
from memlib.code_version import code_version
from memlib.config import RunConfig
from memlib.cross_validation import check_folds, perform_cross_validation, plan_cross_validation
from memlib.datasets import Dataset
from memlib.example_tied_dropout import dropout_layers, set_mode
from memlib.experiments import ExperimentsConfig
from memlib.layer_units import (
    LoadCheckpoint,
    check_retraining,
    perform_retraining,
    perform_rewinding,
    plan_retraining,
    plan_rewinding,
)
from memlib.neuron_units import check_search, perform_critical_units, plan_critical_units
from memlib.probes import check_probe
from memlib.results import ResultStore
from memlib.runs import RunData, build_network, device_name, prepare_data
from memlib.schemas import table_from_rows
from memlib.units import Task, Unit

EXPERIMENTS = {
    "rewinding": perform_rewinding,
    "retraining": perform_retraining,
    "critical_units": perform_critical_units,
    "cross_validation": perform_cross_validation,
}
TRAINS_ANEW = ("cross_validation",)  # and measures nothing of the run's own network
# What a unit of each writes; its own table is the last and the proof of completion.
TABLES = {name: (name,) for name in EXPERIMENTS} | {"critical_units": ("removed_units", "critical_units")}


def plan_tasks(run: RunConfig, experiments: ExperimentsConfig, group_names: Sequence[str]) -> list[Task]:
    """Return the tasks of the wanted experiments on one run; `group_names` are its model's layer groups by depth.

    Raises:
        InputError: a group does not exist, or an epoch is asked for whose checkpoint the run does not keep.
    """
    tasks = []
    if experiments.rewinding is not None:
        tasks += plan_rewinding(run, experiments.rewinding, group_names)
    if experiments.retraining is not None:
        tasks += plan_retraining(run, experiments.retraining, group_names)
    if experiments.critical_units is not None:
        tasks += plan_critical_units(run, experiments.critical_units)
    if experiments.cross_validation is not None:
        tasks += plan_cross_validation(run, experiments.cross_validation)
    return tasks


def check_experiments(run: RunConfig, experiments: ExperimentsConfig, data: RunData) -> None:
    """Check that the run's training set has what the wanted experiments draw from it.

    Raises:
        InputError: it has too few examples, too many classes, or no noisy examples where they are asked for.
    """
    if experiments.retraining is not None and run.noise.fraction > 0:
        check_retraining(experiments.retraining, data)
    if experiments.critical_units is not None:
        check_search(experiments.critical_units, data)
    if experiments.cross_validation is not None:
        check_folds(experiments.cross_validation.folds, len(data.train))


def asks_for_groups(experiments: ExperimentsConfig) -> bool:
    """Return whether planning the wanted experiments needs the names of the run's layer groups."""
    return experiments.rewinding is not None or experiments.retraining is not None


def perform_task(
    task: Task,
    dataset: Dataset,
    store: ResultStore,
    *,
    device: torch.device,
    load_checkpoint: LoadCheckpoint | None = None,
) -> None:
    """Compute a task and write each of its units: its row in `units`, then the rows of its experiment.

    `load_checkpoint` gives the run's checkpoints by epoch; default: read from the store.

    Raises:
        InputError: a checkpoint is missing, damaged or another architecture's, or the network's code is another one.
        Diverged: a retraining diverged.
        OSError: the storage refuses.
    """
    started = time.monotonic()
    run = task.run
    load_checkpoint = load_checkpoint or CheckpointFolder(store.storage, run.run_id).load_epoch
    model = build_network(run, dataset)
    if dropout_layers(model):
        set_mode(model, "scaled")  # the mode that takes any example
    final, where = load_checkpoint(run.training.epochs), f"of run {run.run_id} at its end"
    load_model_state(model, final.tensors, where=where)
    model.to(device).to(memory_format=torch.channels_last)
    data = prepare_data(run, dataset)
    if task.experiment not in TRAINS_ANEW:
        check_probe(model, data.train, final.facts, where=where)
    rows = EXPERIMENTS[task.experiment](task, model, data, load_checkpoint)
    seconds = (time.monotonic() - started) / len(task.units)
    for unit, tables in zip(task.units, rows, strict=True):
        for table in tables.keys() - {unit.experiment}:
            store.write(table, unit.unit_id, table_from_rows(table, tables[table]))
        record_unit(unit, store, device=device, seconds=seconds)
        # The proof of completion last: what is killed before it is repeated whole, and no unit is without its row.
        store.write(unit.experiment, unit.unit_id, table_from_rows(unit.experiment, tables[unit.experiment]))


def done_units(store: ResultStore, experiment: str) -> set[str]:
    """Return the ids of an experiment's units whose every table is there."""
    return set.intersection(*(store.units(table) for table in TABLES.get(experiment, (experiment,))))


def record_unit_failure(task: Task, store: ResultStore, *, device: torch.device | None, error: str) -> None:
    """Write a row with status `failed` and the reason for every unit of the task that is not done.

    The next sweep tries them again.
    """
    done = done_units(store, task.experiment)
    for unit in task.units:
        if unit.unit_id not in done:
            record_unit(unit, store, device=device, seconds=None, error=error)


def record_unit(
    unit: Unit, store: ResultStore, *, device: torch.device | None, seconds: float | None, error: str | None = None
) -> None:
    """Write a unit's row in `units`: done, or failed where there is an `error`."""
    row = {
        "run_id": unit.run.run_id,
        "experiment": unit.experiment,
        "settings": json.dumps(unit.settings, sort_keys=True),
        "code_version": code_version(),
        "device": None if device is None else device_name(device),
        "seconds": seconds,
        "status": "done" if error is None else "failed",
        "error": error,
    }
    store.write("units", unit.unit_id, table_from_rows("units", [row]))
