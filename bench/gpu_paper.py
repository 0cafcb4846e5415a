"""The paper's own runs on one card: ResNet-9 with all experiments, a part a run, tables kept and checkpoints not.

A run that is interrupted continues where its files are still there. Units that are done stay; the ones that are not
need the run's checkpoints, so those travel with its tables if it is to go on on another machine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_sizes import Sizes, load
from torch.utils.flop_counter import FlopCounterMode

from memlib.config import RunConfig
from memlib.datasets import Dataset
from memlib.experiments import ExperimentsConfig
from memlib.grouping import layer_groups
from memlib.models import build_model
from memlib.pruning import model_size
from memlib.results import ResultStore, create_results
from memlib.runs import build_network, perform_run
from memlib.tasks import EXPERIMENTS, done_units, perform_task, plan_tasks
from memlib.units import Task, missing_tasks
from sweeps.plan import load_preset, plan_runs, with_axes

MODEL = "resnet9"
FINISHED = "finished"  # a file in a run's folder once its checkpoints are not needed any more
RESERVE = 1.2  # work is begun if this many times its seconds are left


class OutOfTime(Exception):
    """The part's minutes are over before all is done; the same command continues."""


@dataclass(frozen=True)
class Places:
    """Where images come from and results go to, and the moment of `time.monotonic` at which a part stops."""

    data: Path | None
    results: Path
    until: float

    def check(self, seconds: float, *, what: str) -> None:
        """Raise OutOfTime if less is left than `what` needs, about `seconds`."""
        left = self.until - time.monotonic()
        if left < RESERVE * seconds:
            raise OutOfTime(f"{what} may take longer than the {left:.0f} s that are left")


def perform_main(dataset_name: str, seed: int, sizes: Sizes, device: torch.device, places: Places) -> dict[str, object]:
    """Compute one run and its experiments into RESULTS/DATASET-SEED; return its times and rates.

    Raises:
        OutOfTime: that moment came before all was done.
    """
    ((run, wanted),) = _planned(dataset_name, seed, sizes, ("none",)).items()
    dataset = load(dataset_name, sizes, places.data)
    folder = places.results / f"{dataset_name}-{seed}"
    store = create_results(folder)
    if run.run_id not in store.finished_runs():
        places.check(sizes.first_seconds["training"], what=f"{folder.name}, its training")
    trained = _train(run, dataset, store, device)
    tasks = plan_tasks(run, wanted, layer_groups(build_network(run, dataset)).names)
    done = {name: done_units(store, name) for name in EXPERIMENTS}
    longest: dict[str, float] = {}
    for task in missing_tasks(tasks, done):
        expected = longest.get(task.experiment, sizes.first_seconds[task.experiment])
        places.check(expected, what=f"{folder.name}, a task of {task.experiment}")
        longest[task.experiment] = max(_perform(task, dataset, store, device), longest.get(task.experiment, 0.0))
    found = {"runs": [trained], "experiments": _times(store)}
    if not (folder / FINISHED).exists():
        searched = _times(store)["critical_units"]
        # A search is repeated twice, once with every operation counted.
        places.check(3 * searched["seconds"] / max(1, searched["units"]), what=f"{folder.name}, the rate of the search")
        found["search"] = _search_rate(tasks, dataset, store, device)
    _finish(folder)
    print(found)
    return found


def perform_table1(
    dataset_name: str, seed: int, sizes: Sizes, device: torch.device, places: Places
) -> dict[str, object]:
    """Compute the runs of Table 1 into RESULTS/DATASET-SEED-table1; return their times and rates.

    Raises:
        OutOfTime: that moment came before all was done.
    """
    dataset = load(dataset_name, sizes, places.data)
    folder = places.results / f"{dataset_name}-{seed}-table1"
    store = create_results(folder)
    trained, longest = [], 0.0
    for run in _planned(dataset_name, seed, sizes, sizes.dropouts):
        is_new = run.run_id not in store.finished_runs()
        if is_new:
            places.check(longest or sizes.first_seconds["training"], what=f"{folder.name}, a run")
        started = time.monotonic()
        trained.append(_train(run, dataset, store, device))
        longest = max(longest, time.monotonic() - started) if is_new else longest
    _finish(folder)
    print(trained)
    return {"runs": trained}


def collect(results: Path) -> dict[str, int]:
    """Copy the tables of all finished runs into RESULTS itself and merge them; return the files each table had."""
    merged = create_results(results)
    for marker in sorted(results.glob(f"*/{FINISHED}")):
        folder = marker.parent
        for path in folder.glob("*/*.parquet"):
            (results / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, results / path.parent.name / path.name)
        shutil.rmtree(folder)
    return merged.compact()


def _planned(
    dataset_name: str, seed: int, sizes: Sizes, dropouts: tuple[str, ...]
) -> dict[RunConfig, ExperimentsConfig]:
    axes = {"datasets": [dataset_name], "models": [MODEL], "seeds": [seed], "dropouts": dropouts}
    return plan_runs(with_axes(load_preset(sizes.preset), axes), sizes.run_settings)


def _finish(folder: Path) -> None:
    """Keep the tables and let the checkpoints go."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / FINISHED).touch()


def _train(run: RunConfig, dataset: Dataset, store: ResultStore, device: torch.device) -> dict[str, object]:
    """Train the run unless it is; return its time and the FLOP/s of training and evaluation together."""
    if run.run_id not in store.finished_runs():
        perform_run(run, dataset, store, device=device)
    (row,) = [row for row in store.read("runs").to_pylist() if row["run_id"] == run.run_id]
    return {
        "run_id": run.run_id,
        "dropout": run.dropout.kind,
        "epochs": run.training.epochs,
        "seconds_of_training_and_evaluation": row["seconds"],
        "flops_per_second": _flops(run, dataset) / row["seconds"],
        "precision": row["precision"],
    }


def _flops(run: RunConfig, dataset: Dataset) -> float:
    """Return the FLOPs of a run: its training steps, and its evaluations of all examples."""
    model = build_model(run.model, image_shape=dataset.image_shape, num_classes=dataset.num_classes, seed=0)
    n, settings = min(run.data.limit or len(dataset.train), len(dataset.train)), run.training
    trained = settings.epochs * (5 if settings.gradient_accounting else 3) * n
    evaluated = len(settings.evaluated_epochs) * (n + len(dataset.test))
    return model_size(model, dataset.image_shape).flops * (trained + evaluated)


def _perform(task: Task, dataset: Dataset, store: ResultStore, device: torch.device) -> float:
    started = time.monotonic()
    perform_task(task, dataset, store, device=device)
    return time.monotonic() - started


def _times(store: ResultStore) -> Mapping[str, Mapping[str, float]]:
    units = store.read("units", columns=["experiment", "seconds"]).to_pylist()
    seconds = {name: [u["seconds"] for u in units if u["experiment"] == name] for name in EXPERIMENTS}
    return {name: {"units": len(times), "seconds": sum(times)} for name, times in seconds.items()}


def _search_rate(tasks: list[Task], dataset: Dataset, store: ResultStore, device: torch.device) -> dict[str, object]:
    """Return examples/s of all searches with their post-flip accuracies, and FLOP/s of one, counted while repeated."""
    searches = [task for task in tasks if task.experiment == "critical_units"]
    if not searches:
        return {}
    rows = store.read("critical_units", columns=["unit_id", "n_removed"]).to_pylist()
    seconds = _times(store)["critical_units"]["seconds"]
    one = searches[0]
    counter = FlopCounterMode(display=False)
    with counter:
        perform_task(one, dataset, store, device=device)
    again = _perform(one, dataset, store, device)  # without the counter, which slows it down
    return {
        "examples": len(rows),
        "removals": sum(row["n_removed"] for row in rows),
        "examples_per_second": len(rows) / seconds,
        "flops_of_a_part": counter.get_total_flops(),
        "flops_per_second": counter.get_total_flops() / again,
    }
