"""Numbers in the words of a caption."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl


def count(number: int, noun: str) -> str:
    """Return e.g. "1 seed" or "3 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spread_over(seeds: Sequence[int]) -> str:
    """Return how a figure shows its seeds: mean and standard deviation, or that there is only one."""
    if len(seeds) == 1:
        return "One seed, so no spread is shown."
    return f"Mean and standard deviation over {len(seeds)} seeds."


def spread_over_seeds_of(rows: pl.DataFrame) -> str:
    """Return how a figure across models shows its seeds, model by model where their numbers differ."""
    models = rows.group_by("model").agg(seeds=pl.col("seed").unique().sort()).sort("model")
    if models["seeds"].list.len().n_unique() == 1:
        return spread_over(models["seeds"][0])
    numbers = [f"{len(seeds)} of {model}" for model, seeds in models.iter_rows()]
    return f"Mean and standard deviation over seeds ({', '.join(numbers)}; no spread is shown for one)."


def judged_on(rows: pl.DataFrame, splits: Sequence[str]) -> str:
    """Return on how many examples of each split the accuracies of a table were measured."""
    found = rows.group_by("split").agg(low=pl.col("n").min(), high=pl.col("n").max())
    numbers = {split: str(low) if low == high else f"{low} to {high}" for split, low, high in found.iter_rows()}
    *others, last = [f"{numbers[split]} {split}" for split in splits if split in numbers]
    return f"Judged on {', '.join(others)}{' and ' if others else ''}{last} examples."


def mean_and_std(mean: float, std: float | None) -> str:
    """Return e.g. "0.981 ± 0.004"; the mean alone where there is no spread."""
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"
