"""E1: how large are the clean and the noisy examples' gradients, and do they pull against each other?

Paper: Figures 1 and 2. The store holds the L2 norms of the epoch's summed gradients,
undivided; the division by the square root of the number of parameters happens here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import count, of_fewer_runs, spread_over
from analysis.cells import GROUP, Cell, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, draw_each, source_of
from analysis.load import Results
from analysis.means import plot_means
from analysis.style import (
    DIVERGING,
    MISSING,
    STROKES,
    house_style,
    label_epochs,
    label_groups,
    new_figure,
    place_legend,
    use_log_scale,
)

_NORMS = {"clean": "clean C", "noisy": "noisy N", "total": "C + N"}
_DODGE = 0.14  # of the distance between two groups, so that error bars stand side by side


def draw_norms(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield Figure 1, one a cell: the gradient norms of C, N and C + N per layer group."""
    first, last = options.gradient_epochs
    draw_cell = partial(_draw_norms, first=first, last=last, runs=results.runs)
    return draw_each("figure1", results.gradients, results.cells, draw_cell, missing=results.missing("gradients"))


def draw_cosines(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield Figure 2, one a cell: the cosine of C and N per layer group and epoch."""
    draw_cell = partial(_draw_cosines, runs=results.runs)
    return draw_each("figure2", results.gradients, results.cells, draw_cell, missing=results.missing("gradients"))


def _draw_norms(name: str, cell: Cell, rows: pl.DataFrame, *, first: int, last: int, runs: pl.DataFrame) -> Outcome:
    window = rows.filter(pl.col("epoch").is_between(first, last))
    if not _covers(rows, window, last - first + 1):
        ends = rows.group_by("run_id").agg(low=pl.col("epoch").min(), high=pl.col("epoch").max())
        return Skipped(
            name,
            f"its runs have gradients of epochs {ends['low'].max()} to {ends['high'].min()}, not all of {first} to "
            f"{last}; give --gradient-epochs FIRST LAST within them, or train longer",
        )
    norms = {kind: _normalized(window, f"{kind}_norm") for kind in _NORMS}
    norms = {kind: norm for kind, norm in norms.items() if (norm["mean"] > 0).any()}
    if not norms:
        return Skipped(name, f"every gradient of epochs {first} to {last} is zero; look at the learning curves")
    source = source_of("gradients", window)
    caption = (
        "Norms of the summed gradients of the clean examples (C), of the noisy ones (N) and of both (C + N), each "
        f"divided by the square root of the number of parameters, per layer group for {cell.title}, averaged over "
        f"epochs {first} to {last}. {_in_precision(rows, runs)} {spread_over(source.seeds)}"
        f"{of_fewer_runs(pl.concat(norms.values()), source.n_runs, by=['group'])} {_compare(norms)}"
    )
    figure = _plot_norms(f"{cell.title}\nepochs {first} to {last}", norms)
    return Drawn(figure, name, f"Figure 1, gradient norms: {cell.title}", caption, source)


def _in_precision(rows: pl.DataFrame, runs: pl.DataFrame) -> str:
    """Name the precision of the gradients: that of the steps, unlike all else that is measured."""
    found = runs.join(rows.select("run_id").unique(), on="run_id", how="semi")["precision"].unique().sort()
    return f"The gradients are of training steps in {' and '.join(found)}."


def _covers(rows: pl.DataFrame, window: pl.DataFrame, n_epochs: int) -> bool:
    found = window.group_by("run_id").agg(pl.col("epoch").n_unique())
    return found.height == rows["run_id"].n_unique() and bool((found["epoch"] == n_epochs).all())


def _normalized(window: pl.DataFrame, norm: str) -> pl.DataFrame:
    per_parameter = pl.col(norm) / pl.col("n_parameters").sqrt()
    runs = window.group_by("run_id", *GROUP, maintain_order=True).agg(norm=per_parameter.mean())
    return over_seeds(runs, by=GROUP, value="norm")


def _compare(norms: dict[str, pl.DataFrame]) -> str:
    if not {"clean", "noisy"} <= norms.keys():
        missing = "noisy" if "clean" in norms else "clean"
        return f"The {missing} examples' gradient is zero."
    both = norms["clean"].join(norms["noisy"], on=GROUP, suffix="_noisy").filter(pl.col("mean") > 0)
    both = both.with_columns(ratio=pl.col("mean_noisy") / pl.col("mean")).sort("ratio", maintain_order=True)
    low, high = both.row(0, named=True), both.row(-1, named=True)
    return (
        f"The noisy norm is {both['ratio'].median():.2f} times the clean one (median over "
        f"{count(both.height, 'group')}; from {low['ratio']:.2f} in {low['group']} to "
        f"{high['ratio']:.2f} in {high['group']})."
    )


def _plot_norms(title: str, norms: dict[str, pl.DataFrame]) -> Figure:
    groups = next(iter(norms.values()))["group"].to_list()
    with house_style():
        figure = new_figure(title, height=3)
        axes = figure.subplots()
        for place, (kind, norm) in enumerate(norms.items()):
            places = np.arange(norm.height) + (place - (len(norms) - 1) / 2) * _DODGE
            plot_means(axes, places, norm, STROKES[kind], label=_NORMS[kind])
        every = pl.concat(norms.values())
        use_log_scale(axes, [*every["mean"], *(every["mean"] + every["std"].fill_null(0))])
        label_groups(axes, groups)
        axes.set_xlabel("layer group, by depth")
        axes.set_ylabel("gradient norm / √parameters")
        place_legend(axes)
    return figure


def _draw_cosines(name: str, cell: Cell, rows: pl.DataFrame, *, runs: pl.DataFrame) -> Outcome:
    cosines = over_seeds(rows, by=[*GROUP, "epoch"], value="cosine")
    if cosines.is_empty():
        return Skipped(name, "every cosine in table gradients is null; set noise.fraction above 0 and train again")
    source = source_of("gradients", rows)
    negative = 100 * (cosines["mean"] < 0).sum() / cosines.height
    lowest = cosines.sort("mean", maintain_order=True).row(0, named=True)
    fewer = of_fewer_runs(cosines, source.n_runs, by=["group", "epoch"])
    caption = (
        "Cosine between the summed gradients of the clean (C) and of the noisy (N) examples, per layer group (rows, "
        f"the first layer on top) and epoch (columns) for {cell.title}; mean over {count(len(source.seeds), 'seed')}; "
        f"grey where one of the two gradients is zero. {_in_precision(rows, runs)}{fewer} Negative in {negative:.0f} % "
        f"of the {count(cosines.height, 'pair')} of group and epoch; lowest at {lowest['mean']:.2f} in "
        f"{lowest['group']}, epoch {lowest['epoch']}."
    )
    figure = _plot_cosines(cell.title, rows.select(GROUP).unique().sort(GROUP), rows["epoch"].unique(), cosines)
    return Drawn(figure, name, f"Figure 2, cosine of clean and noisy gradient: {cell.title}", caption, source)


def _plot_cosines(title: str, groups: pl.DataFrame, epochs: pl.Series, cosines: pl.DataFrame) -> Figure:
    grid = _as_grid(groups, epochs, cosines)
    first, last = epochs.sort()[0], epochs.sort()[-1]
    with house_style():
        figure = new_figure(title, height=min(1.5 + 0.14 * len(grid), 6.5))
        axes = figure.subplots()
        colours = colormaps[DIVERGING].with_extremes(bad=MISSING)
        image = axes.imshow(
            np.ma.masked_invalid(grid),
            cmap=colours,
            vmin=-1,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(first - 0.5, last + 0.5, len(grid) - 0.5, -0.5),
        )
        axes.grid(False)
        _frame(axes)
        label_groups(axes, groups["group"].to_list(), vertical=True)
        label_epochs(axes)
        axes.set_ylabel("layer group, first on top")
        figure.colorbar(image, ax=axes, label="cosine of C and N", ticks=(-1, -0.5, 0, 0.5, 1), aspect=18, pad=0.03)
    return figure


def _as_grid(groups: pl.DataFrame, epochs: pl.Series, cosines: pl.DataFrame) -> np.ndarray:
    """Return mean cosines, groups by epochs from the first to the last, NaN where there is none."""
    numbered = cosines.join(groups.with_row_index("row"), on=GROUP)
    every_epoch = np.sort(epochs.to_numpy())
    grid = np.full((groups.height, every_epoch[-1] - every_epoch[0] + 1), np.nan)
    grid[numbered["row"].to_numpy(), numbered["epoch"].to_numpy() - every_epoch[0]] = numbered["mean"].to_numpy()
    return grid


def _frame(axes: Axes) -> None:
    axes.spines[:].set_visible(True)
    axes.tick_params(length=2)
