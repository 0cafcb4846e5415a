"""What grows with the number of units: the driver, the store, a sweep that starts again.

`python bench/scale.py [--units 10000] [--runs 20]` measures on this machine:
- planning: settings to units, and their ids;
- a sweep that finds everything done: what it reads, from a folder with one file a unit and table;
- submitting: units of no work through the sweep's own pool and Ray, in steps, with the driver's memory.

The process's own CPU seconds stand beside wall seconds, which other programs disturb.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from timing import save

from memlib.checkpoints import CheckpointFolder
from memlib.config import RunConfig, build_config, config_to_json
from memlib.experiments import CriticalUnitsConfig, ExperimentsConfig
from memlib.results import ResultStore, create_results
from memlib.schemas import table_from_rows
from memlib.tasks import TABLES, plan_tasks
from memlib.units import Task
from sweeps.wanted import still_to_do

GROUPS = ("conv1", "conv2", "res1", "conv3", "conv4", "res2", "conv5", "res3", "classifier")
STEPS = 10  # of submitting, each with a row of its own


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure what grows with the number of units.")
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the store is made (default: a temporary folder)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memlib-scale-", dir=given.folder))
    try:
        measured = measure(given.units, given.runs, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(measured, indent=2))
    save("scale", measured, torch.device("cpu"), units=given.units, runs=given.runs)


def measure(n_units: int, n_runs: int, folder: Path) -> dict[str, Any]:
    """Return all rows; the store is made in `folder`."""
    wanted = make_plan(n_units, n_runs)
    tasks, planning = timed(lambda: plan_all(wanted))
    store = create_results(folder / "results")
    _, writing = timed(lambda: fill(store, wanted, tasks))
    left, resuming = timed(lambda: still_to_do(wanted, store))
    assert_nothing(left.runs or left.tasks)
    _, compacting = timed(store.compact)
    left, resuming_compacted = timed(lambda: still_to_do(wanted, store))
    assert_nothing(left.runs or left.tasks)
    return {
        "planning": planning,
        "writing": writing,
        "resuming": resuming,
        "compacting": compacting,
        "resuming_compacted": resuming_compacted,
        "submitting": submit(tasks, str(folder / "results")),
        "submitting_to_4000_lanes": submit(tasks, str(folder / "results"), lanes=4000),  # 1,000 GPUs, 4 tasks each
    }


def make_plan(n_units: int, n_runs: int) -> dict[RunConfig, ExperimentsConfig]:
    """Return runs that want `n_units` units of the search for critical units in all, each a task of its own."""
    per_run = n_units // n_runs // 2  # of clean and of noisy examples
    run = build_config(RunConfig, {"data": {"name": "digits", "image_size": 16}, "model": {"width": 0.0625}})
    experiments = ExperimentsConfig(critical_units=CriticalUnitsConfig(examples=per_run, part_size=1))
    return {replace(run, seed=seed): experiments for seed in range(n_runs)}


def plan_all(wanted: Mapping[RunConfig, ExperimentsConfig]) -> list[Task]:
    """Return all tasks, with the ids of their units computed."""
    tasks = [task for run, asked in wanted.items() for task in plan_tasks(run, asked, GROUPS)]
    for task in tasks:
        for unit in task.units:
            _ = unit.unit_id
    return tasks


def fill(store: ResultStore, wanted: Mapping[RunConfig, ExperimentsConfig], tasks: Sequence[Task]) -> None:
    """Write what finished runs and units leave: a row in each of their tables, of `gradients` one a layer group."""
    for run in wanted:
        facts = {"run_id": run.run_id}
        group = {"epoch": 1, "clean_norm": 1.0, "noisy_norm": 1.0, "total_norm": 1.0, "cosine": 0.0, "n_parameters": 1}
        rows = [{**facts, **group, "group": name, "group_index": i} for i, name in enumerate(GROUPS)]
        store.write("gradients", run.run_id, table_from_rows("gradients", rows))
        for table in ("epochs", "dynamics", "examples"):
            store.write(table, run.run_id, table_from_rows(table, [facts]))
        done = {**facts, "config": config_to_json(run), "status": "done", "seed": run.seed, "dataset": run.data.name}
        store.write("runs", run.run_id, table_from_rows("runs", [done]))
        for epoch in run.checkpoint_epochs:
            CheckpointFolder(store.storage, run.run_id).save_epoch(epoch, torch.nn.Linear(1, 1), {})
    for task in tasks:
        for unit in task.units:
            row = {"run_id": task.run.run_id, "experiment": unit.experiment, "status": "done", "seconds": 1.0}
            store.write("units", unit.unit_id, table_from_rows("units", [row]))
            for table in TABLES["critical_units"]:
                store.write(table, unit.unit_id, table_from_rows(table, [{"example_id": 0}]))


def submit(tasks: Sequence[Task], results: str, *, lanes: int | None = None) -> list[dict[str, float]]:
    """Return wall and driver's CPU milliseconds a unit, and the driver's memory, for each step of submitting no work.

    lanes: how many tasks the pool believes to run at once; default: this machine's CPUs.
    """
    from sweeps.cluster import start_ray, stop_ray

    capacity = start_ray(None)
    if lanes is not None:
        capacity = replace(capacity, cpus=lanes)
    import ray

    from sweeps import unit_tasks
    from sweeps.progress import SweepProgress

    @ray.remote
    def nothing(*arguments: object) -> unit_tasks.Outcome:
        return unit_tasks.Outcome(None)

    original, unit_tasks._perform = unit_tasks._perform, nothing
    images = {"digits@16": ray.put(0)}
    rows = []
    try:
        with SweepProgress([], Console(quiet=True)) as progress:
            pool = unit_tasks.TaskPool(images, results, capacity, progress)
            pool.add(tasks[:100])  # the workers are started
            pool.finish()
            pool.add(tasks)
            for step in range(1, STEPS + 1):
                left = len(tasks) * (STEPS - step) // STEPS
                n = in_hand(pool) - left
                _, spent = timed(lambda left=left: advance_to(pool, left))
                memory = psutil.Process().memory_info().rss / 2**20
                rows.append({"done": len(tasks) - left, "driver_mb": memory, **per_unit(spent, n)})
    finally:
        unit_tasks._perform = original
        stop_ray()
    return rows


def advance_to(pool: Any, left: int) -> None:  # noqa: ANN401 - Ray is imported after its environment is set
    """Work until only `left` units wait or run."""
    while in_hand(pool) > left:
        pool.advance(seconds=1.0)


def in_hand(pool: Any) -> int:  # noqa: ANN401
    """Return the number of units that wait or run."""
    return len(pool._waiting) + len(pool._running)


def per_unit(spent: Mapping[str, float], n: int) -> dict[str, float]:
    """Return milliseconds a unit."""
    return {f"{clock}_ms_a_unit": 1000 * seconds / max(1, n) for clock, seconds in spent.items()}


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what `work` returned, and its wall and CPU seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    done = work()
    return done, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def assert_nothing(left: object) -> None:
    """Raise if a finished store leaves something to do."""
    if left:
        raise RuntimeError(f"a finished store left something to do: {left}")


if __name__ == "__main__":
    main()
