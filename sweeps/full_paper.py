"""The command that runs the paper: `python sweeps/full_paper.py [--preset quick|laptop|paper]`.

It computes what is wanted minus what is done: running it again continues it, and running it with
more seeds, data sets or settings computes only what is new.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from memlib.config import RunConfig
from memlib.errors import InputError
from memlib.experiments import ExperimentsConfig
from memlib.results import ResultStore, create_results
from memlib.tasks import TRAINS_ANEW, plan_tasks
from memlib.units import Task, missing_tasks
from sweeps.cluster import Capacity, check_address, stop_ray
from sweeps.command import DONE, SOME_FAILED, add_places, join_ray, run_command, share_images
from sweeps.costs import Place, describe_plan
from sweeps.failures import storage_patience
from sweeps.plan import (
    AXES,
    DROPOUTS,
    EXPERIMENTS,
    load_preset,
    merge,
    parse_setting,
    plan_runs,
    preset_names,
    with_axes,
)
from sweeps.preflight import check_images, check_names, check_runs, load_datasets
from sweeps.progress import SweepProgress, run_label, task_label
from sweeps.wanted import ToDo, done_by_experiment, still_to_do


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all done, 1 some failed, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    return run_command(lambda console: _sweep(options, console))


def _sweep(options: argparse.Namespace, console: Console) -> int:
    capacity = None
    check_address(options.address)
    if options.preset is None:
        capacity = join_ray(options, console)
        options.preset = "paper" if capacity.gpus else "quick"
        console.print(f"no --preset given: Ray sees {capacity.gpus} GPUs, so it is {options.preset}.")
    try:
        wanted = _wanted(options)
        check_names(list(wanted))
        storage_patience()
        store = create_results(options.results)
        if options.tensorboard and not store.storage.is_local:
            raise InputError(f"--tensorboard needs a local results folder, not {options.results}; leave it out.")
        options.results = store.storage.uri  # trials run in folders and with variables of their own
        to_do = still_to_do(wanted, store, options.data)
        _describe_to_do(to_do, len(wanted), options, console)
        if not to_do.runs and not to_do.tasks:
            console.print("nothing to do: everything is already done.")
            return DONE
        runs = [*to_do.runs, *(task.run for task in to_do.tasks)]
        datasets = load_datasets(runs, options.data)
        check_images(runs, datasets, store)
        names = check_runs({run: wanted[run] for run in runs}, datasets)
        planned = {run: plan_tasks(run, wanted[run], names[run]) for run in to_do.runs}
        done = done_by_experiment(store)
        later = {run: missing_tasks(tasks, done) for run, tasks in planned.items()}
        _warn_of_earlier_networks(to_do.repeated, store, console)
        capacity = capacity or join_ray(options, console)
        place = Place(capacity, store, console)
        describe_plan(to_do, later, datasets, place)
        images = share_images(datasets, options, place)
        return DONE if options.dry_run else _perform(to_do, later, images, capacity, options, console)
    finally:
        stop_ray()


def _describe_to_do(to_do: ToDo, n_wanted: int, options: argparse.Namespace, console: Console) -> None:
    n_runs, n_units = len(to_do.runs), sum(len(task.units) for task in to_do.tasks)
    units = f", {n_units} units of experiments to do on those" if n_units else ""
    console.print(
        f"{n_wanted} runs wanted, {n_wanted - n_runs} done{units}, {n_runs} to do; results: {options.results}"
    )


def _warn_of_earlier_networks(repeated: Sequence[RunConfig], store: ResultStore, console: Console) -> None:
    ids = {run.run_id for run in repeated}
    columns = ["run_id", "experiment", "status"]
    rows = store.read("units", columns=columns).to_pylist() if ids else []
    on_networks = [row for row in rows if row["status"] == "done" and row["experiment"] not in TRAINS_ANEW]
    n_units = sum(row["run_id"] in ids for row in on_networks)
    if n_units:
        console.print(
            f"note: {len(repeated)} finished runs lack a state or a table and are trained again; {n_units} units of "
            "experiments on them stay as they are. Where training does not repeat to the bit (GPUs, other numbers of "
            "threads, another commit) those are of the earlier networks: give another --results there."
        )


def _perform(
    to_do: ToDo,
    later: Mapping[RunConfig, list[Task]],
    images: Mapping[str, Any],
    capacity: Capacity,
    options: argparse.Namespace,
    console: Console,
) -> int:
    # Ray is imported only after its environment is set
    from sweeps.training_runs import Watcher, train_runs
    from sweeps.unit_tasks import TaskPool

    with SweepProgress(to_do.runs, console) as progress:
        pool = TaskPool(images, options.results, capacity, progress)
        pool.add(to_do.tasks)
        failed_runs = train_runs(
            to_do.runs,
            images,
            results=options.results,
            capacity=capacity,
            watcher=Watcher(progress, ended=lambda run: pool.add(later[run]), idle=pool.advance),
            tensorboard=options.tensorboard,
        )
        pool.finish()
    for failure in failed_runs:
        console.print(f"failed: {run_label(failure.run)} ({failure.run.run_id}): {failure.error}")
    for failure in pool.failures:
        console.print(f"failed: {task_label(failure.task)} ({failure.task.run.run_id}): {failure.error}")
    return SOME_FAILED if failed_runs or pool.failures else DONE


def _wanted(options: argparse.Namespace) -> dict[RunConfig, ExperimentsConfig]:
    layers = [parse_setting(text) for text in options.set]
    if options.epochs is not None:
        layers.append({"training": {"epochs": options.epochs}})
    if options.limit is not None:
        layers.append({"data": {"limit": options.limit}})
    axes = {axis: getattr(options, axis) for axis in AXES}
    return plan_runs(
        with_axes(load_preset(options.preset), axes),
        merge(layers),
        experiments=options.experiments,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python sweeps/full_paper.py", description="Train what is wanted and not yet done, on Ray."
    )
    add = parser.add_argument
    add("--preset", help=f"one of {', '.join(preset_names())}; default: paper where Ray sees a GPU, else quick")
    add("--datasets", nargs="+", metavar="NAME", help="mnist cifar10 svhn digits folder:PATH parquet:PATH")
    add("--models", nargs="+", metavar="NAME", help="resnet9 resnet50 vit timm:NAME")
    add("--seeds", nargs="+", type=int, metavar="N", help="one run each")
    add("--noise", nargs="+", type=float, metavar="SHARE", help="shares of training labels made wrong, in [0, 1)")
    add("--dropouts", nargs="+", metavar="NAME", help=f"some of {' '.join(DROPOUTS)}; none: the main runs alone")
    add("--epochs", type=int, metavar="N", help="epochs of training; other epochs make another run")
    add("--limit", type=int, metavar="N", help="train on a class-balanced subset of N images")
    add(
        "--experiments",
        nargs="*",
        default=None,
        metavar="NAME",
        help=f"only these of {', '.join(EXPERIMENTS)}; none: train only",
    )
    add_places(parser)
    add("--tensorboard", action="store_true", help="also write TensorBoard scalars to RESULTS/tensorboard")
    return parser


if __name__ == "__main__":
    sys.exit(main())
