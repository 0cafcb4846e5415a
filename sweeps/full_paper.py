"""The command that runs the paper: `python sweeps/full_paper.py [--preset quick|laptop|paper]`.

It computes what is wanted minus what is done: running it again continues it, and running it with
more seeds, data sets or settings computes only what is new.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from memlib.config import RunConfig
from memlib.datasets import Dataset
from memlib.errors import InputError
from memlib.results import create_results
from memlib.runs import is_finished
from sweeps.cluster import Capacity, start_ray, stop_ray
from sweeps.costs import describe_plan
from sweeps.plan import AXES, load_preset, merge, parse_setting, plan_runs, preset_names, with_axes
from sweeps.preflight import check_names, check_runs, load_datasets
from sweeps.progress import SweepProgress, run_label

DONE, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all done, 1 some failed, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        return _sweep(options, console)
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        console.print("interrupted; finished epochs are kept: run the same command again to continue.")
        return INTERRUPTED


def _sweep(options: argparse.Namespace, console: Console) -> int:
    capacity = None
    if options.preset is None:
        capacity = start_ray(options.address)
        options.preset = "paper" if capacity.gpus else "quick"
        console.print(f"no --preset given: Ray sees {capacity.gpus} GPUs, so it is {options.preset}.")
    try:
        wanted = _wanted_runs(options)
        check_names(wanted)
        store = create_results(options.results)
        if options.tensorboard and not store.storage.is_local:
            raise InputError(f"--tensorboard needs a local results folder, not {options.results}; leave it out.")
        if store.storage.is_local:
            options.results = store.storage.root  # absolute: trials run in folders of their own
        finished = store.finished_runs()
        to_do = [run for run in wanted if not is_finished(run, store, finished)]
        n_done = len(wanted) - len(to_do)
        console.print(f"{len(wanted)} runs wanted, {n_done} done, {len(to_do)} to do; results: {options.results}")
        if not to_do:
            console.print("nothing to do: everything is already done.")
            return DONE
        datasets = load_datasets(to_do, options.data)
        check_runs(to_do, datasets, store)
        capacity = capacity or start_ray(options.address)
        describe_plan(to_do, datasets, capacity, store, console)
        return DONE if options.dry_run else _perform(to_do, datasets, capacity, options, console)
    finally:
        stop_ray()


def _perform(
    runs: list[RunConfig],
    datasets: Mapping[str, Dataset],
    capacity: Capacity,
    options: argparse.Namespace,
    console: Console,
) -> int:
    from sweeps.training_runs import train_runs  # Ray is imported only after its environment is set

    with SweepProgress(runs, console) as progress:
        failures = train_runs(
            runs,
            datasets,
            results=options.results,
            capacity=capacity,
            progress=progress,
            tensorboard=options.tensorboard,
        )
    for failure in failures:
        console.print(f"failed: {run_label(failure.run)} ({failure.run.run_id}): {failure.error}")
    return SOME_FAILED if failures else DONE


def _wanted_runs(options: argparse.Namespace) -> list[RunConfig]:
    layers = [parse_setting(text) for text in options.set]
    if options.epochs is not None:
        layers.append({"training": {"epochs": options.epochs}})
    if options.limit is not None:
        layers.append({"data": {"limit": options.limit}})
    axes = {axis: getattr(options, axis) for axis in AXES}
    return plan_runs(with_axes(load_preset(options.preset), axes), merge(layers))


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
    add("--epochs", type=int, metavar="N", help="epochs of training; other epochs make another run")
    add("--limit", type=int, metavar="N", help="train on a class-balanced subset of N images")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. training.peak_lr=0.05")
    add("--data", type=Path, metavar="ROOT", help="folder with NAME/train.parquet or torchvision's files")
    add("--results", default="results", metavar="PLACE", help="folder or s3://BUCKET/FOLDER (default: results)")
    add("--address", metavar="ADDRESS", help="a running Ray cluster (auto, HOST:PORT); default: start Ray here")
    add("--dry-run", action="store_true", help="show the runs and what they will cost, and stop")
    add("--tensorboard", action="store_true", help="also write TensorBoard scalars to RESULTS/tensorboard")
    return parser


if __name__ == "__main__":
    sys.exit(main())
