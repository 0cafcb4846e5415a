"""From a data set and the command line to the trials of a search; pure, no Ray, no compute."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch

from memlib.config import RunConfig, build_config
from memlib.errors import InputError
from memlib.results import ResultStore
from memlib.seeds import stream
from memlib.trials import TABLE, trial_unit
from sweeps.plan import check_no_axis, merge

OWN_PLACES = "own"  # how an axis names the places a model has for its dropout
OPTIONS = {
    "data.name": "--dataset",
    "seed": "--seeds",
    "dropout.kind": "--p-gen and --p-mem",
    "dropout.p_gen": "--p-gen",
    "dropout.p_mem": "--p-mem",
    "dropout.after": "--after",
    "model.width": "--width",
    "training.peak_lr": "--peak-lr",
}


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Which settings are tried, and how soon bad ones are given up.

    after: layer groups or module names joined by "+", or "own" for the model's own places. peak_lr: empty for that of
    the settings. samples: so many of all combinations, drawn; None for all. grace: epochs before the first cut; None
    for a third of a trial's, as wrong labels are memorized late. reduction: at grace, grace * reduction, ... epochs one
    trial in so many goes on.
    """

    p_gen: tuple[float, ...]
    p_mem: tuple[float, ...]
    width: tuple[float, ...]
    after: tuple[str, ...] = (OWN_PLACES,)
    peak_lr: tuple[float, ...] = ()
    samples: int | None = None
    grace: int | None = None
    reduction: float = 3.0

    def __post_init__(self) -> None:
        for name in ("p_gen", "p_mem", "width", "after"):
            if not getattr(self, name):
                raise InputError(f"the search has no value for {name}; give at least one.")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"--samples is {self.samples}; give at least 1, or leave it out for all combinations.")
        if self.grace is not None and self.grace < 1:
            raise InputError(f"--grace is {self.grace}; give at least 1 epoch.")
        if not self.reduction > 1:
            raise InputError(f"--reduction is {self.reduction}; give a number above 1, e.g. 3 to keep one in three.")


@dataclass(frozen=True)
class SearchPlan:
    """The trials of a search, in the order in which they start, and the controls without dropout."""

    trials: tuple[RunConfig, ...]
    controls: tuple[RunConfig, ...]
    space: SearchSpace

    @property
    def runs(self) -> tuple[RunConfig, ...]:
        """Return all of them, the controls first: they are never stopped early."""
        return (*self.controls, *self.trials)

    @property
    def epochs(self) -> int:
        """Return the epochs of a trial that is not stopped."""
        return self.controls[0].training.epochs

    @property
    def grace(self) -> int:
        """Return the epochs before the first trials are compared and stopped."""
        return self.space.grace or math.ceil(self.epochs / 3)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Return the epochs after which trials are compared and stopped, without the last of a trial."""
        cuts = (math.ceil(self.grace * self.space.reduction**k) for k in itertools.count())
        return tuple(itertools.takewhile(lambda epoch: epoch < self.epochs, cuts))


@dataclass(frozen=True)
class Search:
    """A search under way: the runs without a result, and the validation curves of trials that have one, by run id."""

    plan: SearchPlan
    to_do: tuple[RunConfig, ...]
    curves: Mapping[str, Sequence[float]]


def search_defaults(dataset: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a run and the space that a search on a data set starts from, nested as in TOML."""
    content = tomllib.loads(files("sweeps").joinpath("searches.toml").read_text())
    own = content["dataset"].get(dataset, {})
    settings = merge([content["settings"], own.get("settings", {}), {"data": {"name": dataset}}])
    return settings, merge([content["space"], own.get("space", {})])


def plan_search(
    dataset: str, overrides: Mapping[str, Any], space: Mapping[str, Any], seeds: Sequence[int]
) -> SearchPlan:
    """Return the search of a data set: `overrides` of a run's settings, and `space`, laid over its defaults.

    Raises:
        InputError: a setting is unknown or out of range, or is one of the axes, or nothing is held out.
    """
    check_no_axis(overrides, OPTIONS)
    base, default_space = search_defaults(dataset)
    settings = merge([base, overrides])
    chosen = build_config(SearchSpace, merge([default_space, space]), path="search.")
    grid = _grid(chosen, settings["training"]["peak_lr"])
    trials = [_run(settings, point, seed) for point in grid for seed in seeds]
    controls = [_run(settings, {**point, "kind": "none"}, seed) for point in grid for seed in seeds]
    plan = SearchPlan(tuple(dict.fromkeys(trials)), tuple(dict.fromkeys(controls)), chosen)
    _check(plan)
    return plan


def continue_search(plan: SearchPlan, store: ResultStore) -> Search:
    """Return what the store does not hold yet, and what it holds.

    A trial stopped early has its result where it was stopped, unless the plan would have let it go on to there.
    """
    columns = ["unit_id", "run_id", "epochs", "stopped_early", "validation_curve"]
    rows = store.read(TABLE, columns=columns).to_pylist()
    done = {row["unit_id"] for row in rows if not row["stopped_early"] or row["epochs"] >= plan.grace}
    curves = {row["run_id"]: row["validation_curve"] for row in rows if row["validation_curve"] is not None}
    to_do = tuple(run for run in plan.runs if trial_unit(run).unit_id not in done)
    ended = [trial.run_id for trial in plan.trials if trial not in to_do]
    return Search(plan, to_do, {run_id: curves[run_id] for run_id in ended})


def trial_label(run: RunConfig) -> str:
    """Return a trial's name in messages, e.g. `p_gen 0.2 p_mem 0.1 width 0.5 lr 0.1 seed 0`."""
    dropout = run.dropout
    shares = "no dropout" if dropout.kind == "none" else f"p_gen {dropout.p_gen:g} p_mem {dropout.p_mem:g}"
    places = f" after {'+'.join(dropout.after)}" if dropout.after else ""
    return f"{shares}{places} width {run.model.width:g} lr {run.training.peak_lr:g} seed {run.seed}"


def _grid(space: SearchSpace, peak_lr: float) -> list[dict[str, Any]]:
    """Return the points to try in a drawn order: more samples only add to fewer, and no corner always comes first."""
    axes = (space.width, space.after, space.peak_lr or (peak_lr,), space.p_gen, space.p_mem)
    points = [
        {"width": width, "after": after, "peak_lr": rate, "p_gen": p_gen, "p_mem": p_mem}
        for width, after, rate, p_gen, p_mem in itertools.product(*axes)
    ]
    order = torch.randperm(len(points), generator=stream(0, "search_order")).tolist()
    return [points[i] for i in order[: space.samples]]


def _run(settings: Mapping[str, Any], point: Mapping[str, Any], seed: int) -> RunConfig:
    after = [] if point["after"] == OWN_PLACES else point["after"].split("+")
    dropout = {"kind": point.get("kind", "example_tied"), "p_gen": point["p_gen"], "p_mem": point["p_mem"]}
    axes = {
        "dropout": {**dropout, "after": after},
        "model": {"width": point["width"]},
        "training": {"peak_lr": point["peak_lr"]},
        "seed": seed,
    }
    return build_config(RunConfig, merge([settings, axes]))


def _check(plan: SearchPlan) -> None:
    if plan.controls[0].data.holdout is None:
        raise InputError("nothing is held out to choose by; set --holdout, e.g. to 0.1.")
    if plan.grace > plan.epochs:
        raise InputError(f"--grace is {plan.grace} but trials have {plan.epochs} epochs; lower it.")
