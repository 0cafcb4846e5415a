"""Numbers in the words of a caption."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

_MOST_NAMED = 4  # values of one column


def count(number: int, noun: str) -> str:
    """Return e.g. "1 seed" or "3 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spread_over(seeds: Sequence[int]) -> str:
    """Return how a figure shows its seeds: mean and standard deviation, or that there is only one."""
    if len(seeds) == 1:
        return "One seed, so no spread is shown."
    return f"Mean and standard deviation over {len(seeds)} seeds."


def spread_over_seeds_of(rows: pl.DataFrame, points: pl.DataFrame, *, by: Sequence[str]) -> str:
    """Return how a figure across models shows its seeds, model by model where their numbers differ.

    points, by: as in `of_fewer_runs`, with column `model` too.
    """
    found = rows.group_by("model").agg(seeds=pl.col("seed").unique().sort(), n_runs=pl.col("run_id").n_unique())
    models = found.sort("model").rows(named=True)
    if len({len(model["seeds"]) for model in models}) == 1:
        spread = spread_over(models[0]["seeds"])
    else:
        numbers = [f"{len(model['seeds'])} of {model['model']}" for model in models]
        spread = f"Mean and standard deviation over seeds ({', '.join(numbers)}; no spread is shown for one)."
    fewer = [
        of_fewer_runs(
            points.filter(model=model["model"]),
            model["n_runs"],
            by=by,
            what="points" if len(models) == 1 else f"points of {model['model']}",
        )
        for model in models
    ]
    return "".join([spread, *fewer])


def of_fewer_runs(points: pl.DataFrame, n_runs: int, *, by: Sequence[str], what: str = "points") -> str:
    """Return which points are of fewer than `n_runs` runs, e.g. " Only from 1 of 2 runs: ..."; "" if none.

    points: a row each, with column `n_runs`, as from `over_seeds`.
    by: columns that name them; one of which every value is among those of fewer runs is left out.
    """
    few = points.filter(pl.col("n_runs") < n_runs)
    if few.is_empty():
        return ""
    low, high = few["n_runs"].min(), few["n_runs"].max()
    numbers = str(low) if low == high else f"{low} to {high}"
    telling = [name for name in by if few[name].n_unique() < points[name].n_unique()]
    named = [f"{name.replace('_', ' ')} {_name_some(few, points, name)}" for name in telling]
    which = f" ({'; '.join(named)})" if named else ""
    return f" Only from {numbers} of {n_runs} runs: {few.height} of {points.height} {what}{which}."


def kinds_of_fewer_runs(examples: pl.DataFrame, n_runs: int, *, what: str = "curves") -> str:
    """Return which kinds of examples fewer than `n_runs` runs have, in the words of `of_fewer_runs`."""
    kinds = examples.group_by("kind").agg(n_runs=pl.col("run_id").n_unique())
    return of_fewer_runs(kinds, n_runs, by=["kind"], what=what)


def _name_some(few: pl.DataFrame, points: pl.DataFrame, name: str) -> str:
    """Return the values of a column that `few` has, in order: by depth for groups and layers."""
    order = f"{name}_index" if f"{name}_index" in points.columns else name
    every = points.unique(name, maintain_order=True).sort(order, maintain_order=True)[name]
    places = every.is_in(few[name].unique().implode()).arg_true()
    chosen = every.gather(places).to_list()
    if len(chosen) > 2 and places[-1] - places[0] == len(chosen) - 1:
        return f"{chosen[0]} to {chosen[-1]}"
    more = [f"{len(chosen) - _MOST_NAMED} more"] if len(chosen) > _MOST_NAMED else []
    return ", ".join([*map(str, chosen[:_MOST_NAMED]), *more])


def judged_on(rows: pl.DataFrame, splits: Sequence[str]) -> str:
    """Return on how many examples of each split the accuracies of a table were measured."""
    found = rows.group_by("split").agg(low=pl.col("n").min(), high=pl.col("n").max())
    numbers = {split: str(low) if low == high else f"{low} to {high}" for split, low, high in found.iter_rows()}
    *others, last = [f"{numbers[split]} {split}" for split in splits if split in numbers]
    return f"Judged on {', '.join(others)}{' and ' if others else ''}{last} examples."


def mean_and_std(mean: float, std: float | None) -> str:
    """Return e.g. "0.981 ± 0.004"; the mean alone where there is no spread."""
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"
