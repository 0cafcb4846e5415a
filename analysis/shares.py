"""Distributions as falling curves: the share of examples above each value, drawn with its spread over seeds."""

from __future__ import annotations

import math

import polars as pl
from matplotlib.axes import Axes

from analysis.cells import over_seeds
from analysis.means import spread_of
from analysis.style import Stroke

_MOST_STEPS = 200
_CURVE = ["run_id", "kind"]


def shares_above(rows: pl.DataFrame, value: str) -> pl.DataFrame:
    """Return the share of a kind's rows with `value` above each place: kind, place; mean, std and n_runs over runs.

    Places are the finite values of all kinds, every so many of them where there are more than can be seen.
    """
    values = rows.filter(pl.col(value).is_finite())[value].unique().sort()
    every = -(-len(values) // _MOST_STEPS) or 1
    places = pl.concat([values.gather_every(every), values.tail(1)]).unique().rename("place").cast(pl.Float64)
    known = rows.select(*_CURVE, pl.col(value).cast(pl.Float64)).drop_nulls(value)
    grid = known.group_by(_CURVE).agg(n=pl.len()).join(places.to_frame(), how="cross").sort("place")
    up_to = known.filter(pl.col(value) < math.inf).group_by(*_CURVE, value).agg(n_up_to=pl.len()).sort(value)
    up_to = up_to.with_columns(pl.col("n_up_to").cum_sum().over(_CURVE))
    found = grid.join_asof(up_to, left_on="place", right_on=value, by=_CURVE, check_sortedness=False)
    shares = found.with_columns(share=(pl.col("n") - pl.col("n_up_to").fill_null(0)) / pl.col("n"))
    return over_seeds(shares, by=["kind", "place"], value="share")


def plot_share_above(axes: Axes, curve: pl.DataFrame, stroke: Stroke, *, ends: tuple[float, float], label: str) -> None:
    """Draw one kind's curve as steps from the left end, where the share is 1, to the right one.

    One `std` up and down is drawn as a band, if there is any.
    """
    first, last = curve.head(1), curve.tail(1)
    first = first.with_columns(
        place=pl.lit(ends[0], pl.Float64), mean=1.0, std=pl.when(pl.col("std").is_not_null()).then(0.0)
    )
    steps = pl.concat([first, curve, last.with_columns(place=pl.lit(ends[1], pl.Float64))])
    places, mean = steps["place"].to_numpy(), steps["mean"].to_numpy()
    axes.plot(
        places, mean, stroke.line, drawstyle="steps-post", color=stroke.colour, linewidth=stroke.width, label=label
    )
    if (std := spread_of(steps)) is not None:
        axes.fill_between(places, mean - std, mean + std, step="post", color=stroke.colour, alpha=0.2, linewidth=0)


def mark_median(axes: Axes, values: pl.Series, stroke: Stroke, *, infinite: float) -> None:
    """Mark the median where the curve falls below one half; an infinite one stands at the place `infinite`.

    Markers get smaller, so that equal medians are seen inside each other.
    """
    median = median_of(values)
    if median is None:
        return
    place = infinite if math.isinf(median) else median
    size = max(7 - 2 * sum(line.get_label() == "_median" for line in axes.lines), 3)
    axes.plot(
        place,
        0.5,
        stroke.marker,
        color=stroke.colour,
        markerfacecolor="white",
        markersize=size,
        zorder=3,
        label="_median",
    )


def fix_shares(axes: Axes) -> None:
    """Show shares from 0 to 1, whatever is drawn."""
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))


def median_of(values: pl.Series) -> float | None:
    """Return the median, infinite if it lies among infinite values; None of none."""
    median = values.cast(pl.Float64).median()
    return median if isinstance(median, float) else None
