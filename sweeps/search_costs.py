"""What a search will cost: from every comparison stopping as many trials as it may, to none being stopped."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from memlib.config import RunConfig
from memlib.datasets import Dataset
from sweeps.costs import Place, estimate_times, image_flops, run_cost
from sweeps.costs import train_size as n_trained_on
from sweeps.estimates import RunCost, Work
from sweeps.preflight import check_disk, dataset_key
from sweeps.search_plan import Search, SearchPlan
from sweeps.throughput import PASSES_PER_PLAIN_STEP, PASSES_PER_STEP


def describe_search(search: Search, datasets: Mapping[str, Dataset], place: Place) -> None:
    """Print what is to do with its FLOPs, and the estimated time and disk of all.

    Raises:
        InputError: the results' disk has no room for it.
    """
    plan, to_do = search.plan, search.to_do
    dataset = datasets[dataset_key(plan.controls[0])]
    n_bytes = sum(run_cost(run, dataset).checkpoint_bytes for run in to_do)
    most = [trial_cost(run, dataset, {run.training.epochs: 1.0}) for run in to_do]
    stops = epochs_if_halved(plan)
    least = [trial_cost(run, dataset, stops if run in plan.trials else {plan.epochs: 1.0}) for run in to_do]
    cuts = ", ".join(map(str, plan.rungs))
    place.console.print(
        f"{plan.epochs} epochs each, or fewer: compared after {cuts or 'none'}, one in {plan.space.reduction:g} goes on"
    )
    works = [Work({}, list(zip(to_do, costs, strict=True))) for costs in (least, most)]
    shortest, longest = estimate_times(works, datasets, place.capacity)
    place.console.print(
        f"on {place.capacity}: {_flops(least)} to {_flops(most)} TFLOP, {shortest} to {longest}, "
        f"at most {n_bytes / 1e6:.0f} MB of checkpoints"
    )
    check_disk(place.store, n_bytes)


def epochs_if_halved(plan: SearchPlan) -> dict[int, float]:
    """Return the share of trials that end after so many epochs if at every cut just one in `reduction` goes on."""
    ends = [*plan.rungs, plan.epochs]
    left = [plan.space.reduction**-k for k in range(len(ends))]
    stopped = [before - after for before, after in itertools.pairwise([*left, 0.0])]
    return dict(zip(ends, stopped, strict=True))


def trial_cost(run: RunConfig, dataset: Dataset, ends: Mapping[int, float]) -> RunCost:
    """Return a trial's expected FLOPs if it ends after each number of epochs with the share given for it."""
    n = n_trained_on(run, dataset)
    n_held_out = int((run.data.holdout or 0) * n / (1 - (run.data.holdout or 0)))
    passes = PASSES_PER_STEP if run.training.gradient_accounting else PASSES_PER_PLAIN_STEP
    judged = n + n_held_out + 2 * len(dataset.test)
    judged_again = 2 * n + n_held_out + len(dataset.test)  # with recalibrated statistics, at the end only
    in_training = sum(share * epochs * passes * n for epochs, share in ends.items())
    n_passes = in_training + sum(
        share * (epochs * n_held_out + judged + (judged_again if epochs == run.training.epochs else 0))
        for epochs, share in ends.items()
    )
    forward = image_flops(run, dataset)
    return RunCost(n_passes * forward, 0, in_training * forward)


def _flops(costs: Sequence[RunCost]) -> str:
    return f"{sum(cost.flops for cost in costs) / 1e12:.3g}"
