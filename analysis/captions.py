"""Numbers in the words of a caption."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    """Return e.g. "1 seed" or "3 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spread_over(seeds: Sequence[int]) -> str:
    """Return how a figure shows its seeds: mean and standard deviation, or that there is only one."""
    if len(seeds) == 1:
        return "One seed, so no spread is shown."
    return f"Mean and standard deviation over {len(seeds)} seeds."


def mean_and_std(mean: float, std: float | None) -> str:
    """Return e.g. "0.981 ± 0.004"; the mean alone where there is no spread."""
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"
