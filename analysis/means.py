"""Means over seeds, drawn with their spread: as a line in a band, or as markers with error bars."""

from __future__ import annotations

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from analysis.style import Stroke

SPLITS = ("clean", "noisy", "test")


def spread_of(means: pl.DataFrame) -> np.ndarray | None:
    """Return column `std`, NaN (which is not drawn) where one run alone has the point; None if no point has any."""
    return means["std"].to_numpy() if means["std"].is_not_null().any() else None


def plot_mean(axes: Axes, curve: pl.DataFrame, *, x: str, stroke: Stroke, label: str, marked: bool = False) -> None:
    """Draw column `mean` against column `x` as a line, `spread_of` it up and down as a band, if any.

    marked: the points are shown too.
    """
    places, mean = curve[x].to_numpy(), curve["mean"].to_numpy()
    marker = stroke.marker if marked else ""
    axes.plot(
        places,
        mean,
        stroke.line,
        marker=marker,
        markersize=2.2,
        color=stroke.colour,
        linewidth=stroke.width,
        label=label,
    )
    if (std := spread_of(curve)) is not None:
        axes.fill_between(places, mean - std, mean + std, color=stroke.colour, alpha=0.2, linewidth=0)


def plot_means(axes: Axes, places: np.ndarray, rows: pl.DataFrame, stroke: Stroke, *, label: str) -> None:
    """Draw column `mean` as markers joined by a line, `spread_of` it up and down as error bars, if any."""
    axes.errorbar(
        places,
        rows["mean"].to_numpy(),
        yerr=spread_of(rows),
        fmt=stroke.marker + stroke.line,
        color=stroke.colour,
        linewidth=stroke.width,
        elinewidth=0.8,
        capsize=1.5,
        label=label,
    )
