"""The command that searches for settings of example-tied dropout: `python sweeps/dropout_search.py --dataset NAME`.

It chooses by held-out training examples and their assigned labels, and says afterwards what the choice is
worth on the test set, beside no dropout. Running it again continues it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from memlib.experiments import ExperimentsConfig
from memlib.results import create_results
from sweeps.cluster import check_address, stop_ray
from sweeps.command import DONE, SOME_FAILED, add_places, join_ray, run_command, share_images
from sweeps.costs import Place
from sweeps.failures import storage_patience
from sweeps.plan import merge, parse_setting
from sweeps.preflight import check_images, check_names, check_runs, load_datasets
from sweeps.progress import SweepProgress
from sweeps.search_costs import describe_search
from sweeps.search_plan import Search, SearchPlan, SearchSpace, continue_search, plan_search, trial_label
from sweeps.search_report import print_report

SPACE = tuple(field.name for field in dataclasses.fields(SearchSpace))
SHORT_FOR = {  # the setting that an option stands for
    "epochs": "training.epochs",
    "limit": "data.limit",
    "holdout": "data.holdout",
    "noise": "noise.fraction",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all done, 1 some failed, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    return run_command(lambda console: _search(options, console))


def _search(options: argparse.Namespace, console: Console) -> int:
    check_address(options.address)
    plan = _plan(options)
    check_names(plan.runs)
    store = create_results(options.results)
    storage_patience()
    search = continue_search(plan, store)
    console.print(
        f"{len(plan.trials)} trials and {len(plan.controls)} controls without dropout wanted, "
        f"{len(plan.runs) - len(search.to_do)} done, {len(search.to_do)} to do; results: {options.results}"
    )
    all_well = True
    try:
        if search.to_do:
            datasets = load_datasets(search.to_do, options.data)
            check_images(search.to_do, datasets, store)
            check_runs(dict.fromkeys(search.to_do, ExperimentsConfig()), datasets)
            place = Place(join_ray(options, console), store, console)
            describe_search(search, datasets, place)
            images = share_images(datasets, options, place)
            all_well = options.dry_run or _perform(search, images, place)
    finally:
        stop_ray()
    if not options.dry_run:
        print_report(plan, store, console)
    return DONE if all_well else SOME_FAILED


def _perform(search: Search, images: Mapping[str, Any], place: Place) -> bool:
    """Run what is to do and return whether all of it ended well."""
    # Ray is imported only after its environment is set
    from sweeps.search_trials import run_search

    results = place.store.storage.uri
    with SweepProgress(search.to_do, place.console, trial_label) as progress:
        failures = run_search(search, images, results=results, capacity=place.capacity, progress=progress)
    for run, error in failures:
        place.console.print(f"failed: {trial_label(run)}: {error}")
    return not failures


def _plan(options: argparse.Namespace) -> SearchPlan:
    layers = [parse_setting(text) for text in options.set]
    layers += [_nested(path, getattr(options, name)) for name, path in SHORT_FOR.items()]
    space = {name: getattr(options, name) for name in SPACE if getattr(options, name) is not None}
    return plan_search(options.dataset, merge(layers), space, options.seeds)


def _nested(path: str, value: object) -> dict[str, Any]:
    section, _, key = path.partition(".")
    return {} if value is None else {section: {key: value}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python sweeps/dropout_search.py",
        description="Search for settings of example-tied dropout by held-out training examples, on Ray.",
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="digits mnist cifar10 svhn folder:PATH parquet:PATH")
    add("--p-gen", nargs="+", type=float, metavar="SHARE", help="shares of generalization neurons to try")
    add("--p-mem", nargs="+", type=float, metavar="SHARE", help="probabilities of memorization neurons to try")
    add("--width", nargs="+", type=float, metavar="FACTOR", help="factors on the network's channels to try")
    add("--after", nargs="+", metavar="NAME+NAME", help="places to try it in; own: the network's own places")
    add("--peak-lr", nargs="+", type=float, metavar="RATE", help="peak learning rates to try")
    add("--samples", type=int, metavar="N", help="try N of all combinations, drawn; default: all")
    add("--grace", type=int, metavar="N", help="epochs before the first trials are stopped")
    add("--reduction", type=float, metavar="X", help="one trial in X goes on at each comparison")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="a trial each of every setting (default: 0)")
    add("--epochs", type=int, metavar="N", help="epochs of a trial that is not stopped")
    add("--limit", type=int, metavar="N", help="a class-balanced subset of N training images, held-out ones included")
    add("--holdout", type=float, metavar="SHARE", help="share of the training images held out to choose by")
    add("--noise", type=float, metavar="SHARE", help="share of training labels made wrong, in [0, 1)")
    add_places(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
