"""The panel of Figure 5 a, of any kinds of examples: how many units are removed until the flip, drawn and in words."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
from matplotlib.axes import Axes

from analysis.captions import count, mean_and_std
from analysis.cells import over_seeds
from analysis.searched import not_skipped
from analysis.shares import mark_median, median_of, plot_share_above, shares_above
from analysis.style import Stroke

_FIRST = 0.75  # left end of the logarithmic axis: no unit removed yet
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)

FLIPS = (
    "share of examples not yet flipped when that many units, one after the other, have been removed for each; those "
    "that never flip are what is left at the right end. The marker is the median over all searched examples, one that "
    "did not flip counting as more than any number"
)


def plot_flips(axes: Axes, rows: pl.DataFrame, strokes: Mapping[str, Stroke]) -> None:
    """Draw, a curve a kind, the share of searched examples not yet flipped against the number of units removed."""
    searched = not_skipped(rows)
    most = int(searched.filter("flipped")["n_removed"].max() or 1)  # pyright: ignore[reportArgumentType]
    never = 1.7 * most
    curves = shares_above(searched, "needed")
    for kind, stroke in strokes.items():
        curve = curves.filter(kind=kind)
        if not curve.is_empty():
            plot_share_above(axes, curve, stroke, ends=(_FIRST, never), label=kind)
            mark_median(axes, searched.filter(kind=kind)["needed"], stroke, infinite=never)
    ticks = [tick for tick in _TICKS if tick <= most]
    axes.set_xscale("log")
    axes.set_xlim(_FIRST, 1.15 * never)
    axes.set_xticks([*ticks, never], [*map(str, ticks), "not\nflipped"])
    axes.set_xticks([], minor=True)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("units removed")
    axes.set_ylabel("share not yet flipped")


def none_flipped(rows: pl.DataFrame) -> str:
    """Return why there is nothing to draw of rows without a flipped example."""
    return f"none of {count(not_skipped(rows).height, 'searched example')} flipped; raise critical_units.max_steps"


def spell_flips(rows: pl.DataFrame, kind: str) -> str:
    """Return one kind's median, mean and numbers of examples, e.g. "noisy: median 3, mean 5.200 (10 examples, ...)"."""
    own = rows.filter(kind=kind)
    searched = not_skipped(own)
    median = median_of(searched["needed"])
    n_stuck = searched.filter(~pl.col("flipped")).height
    numbers = (
        f"{count(searched.height, 'example')}, {n_stuck} not flipped, {own.height - searched.height} skipped as not "
        "predicted as assigned"
    )
    if median is None:
        return f"{kind}: {numbers}"
    middle = "not flipped" if median == float("inf") else f"{median:g}"
    return f"{kind}: median {middle}, {spell_mean(searched.filter('flipped'), 'n_removed')} ({numbers})"


def spell_mean(rows: pl.DataFrame, value: str) -> str:
    """Return e.g. "mean 5.200 ± 0.300", over runs of each run's mean."""
    by_run = rows.group_by("run_id", "kind").agg(pl.col(value).cast(pl.Float64).mean())
    found = over_seeds(by_run, by=["kind"], value=value)
    return f"mean {mean_and_std(found['mean'][0], found['std'][0])}" if found.height else "no mean"
