"""E3: does a group that is trained anew on clean examples alone bring the noisy ones back?

Paper: layer retraining, Figure 4.
Deviations: test examples, the spread over seeds, and the control (trained on noisy examples alone) are shown too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import count, judged_on, mean_and_std, of_fewer_runs, spread_over
from analysis.cells import GROUP, Cell, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, draw_each, source_of
from analysis.load import Results
from analysis.means import SPLITS, plot_mean
from analysis.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    STROKES,
    fix_range,
    house_style,
    label_epochs,
    new_figure,
    place_legend_below,
    short_names,
)

_CURVE = ["run_id", "seed", *GROUP, "split"]
_STROKES = {**STROKES, "test": replace(STROKES["test"], width=0.6)}
_NOT_SETTINGS = ("group", "trained_on", "limit")  # of training: `judged_on` tells the limit
_LONGEST_TITLE = 16  # characters
_MOST_PANELS = 12  # at column width, three side by side; more of them fill the page's width, six side by side


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield Figure 4, one a cell: accuracies while one group at a time is trained anew on clean examples."""
    missing = results.missing("retraining", "with trained_on clean")
    return _draw_each("figure4", "clean", results, missing=missing)


def draw_control(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield the control of Figure 4, trained on noisy examples alone, for the cells that have it."""
    return _draw_each("figure4_control", "noisy", results, missing=None)


def carry_forward(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the curves of retrained groups, each as long as the longest of its group.

    A curve that stopped early keeps its last accuracy; column `is_carried` marks what was added.
    """
    last = pl.col("epoch").max()
    lengths = rows.group_by(_CURVE).agg().join(rows.group_by(GROUP).agg(last=last), on=GROUP)
    whole = lengths.with_columns(epoch=pl.int_ranges(0, pl.col("last") + 1)).explode("epoch").drop("last")
    found = whole.join(rows.select(*_CURVE, "epoch", "accuracy"), on=[*_CURVE, "epoch"], how="left")
    found = found.sort(*_CURVE, "epoch").with_columns(is_carried=pl.col("accuracy").is_null())
    return found.with_columns(pl.col("accuracy").forward_fill().over(_CURVE))


def _draw_each(name: str, kind: str, results: Results, *, missing: str | None) -> Iterator[Outcome]:
    rows = results.table("retraining").filter(trained_on=kind)
    if not rows.is_empty():
        rows = rows.join(_settings_of_units(results, rows), on="unit_id", how="left", maintain_order="left")
    return draw_each(name, rows, results.cells, partial(_draw, kind=kind), missing=missing)


def _draw(name: str, cell: Cell, rows: pl.DataFrame, *, kind: str) -> Outcome:
    rows = _on_most_examples(rows.filter(pl.col("reset_epoch") == pl.col("reset_epoch").min()))
    if not rows.select(*_CURVE, "epoch").is_unique().all():
        return Skipped(
            name,
            "some groups were retrained several times, with different settings, which must not be averaged; "
            "draw from a results folder with one retraining of each group",
        )
    settings = rows["settings"].drop_nulls().unique().sort()
    if len(settings) > 1:
        return Skipped(
            name,
            f"its groups were retrained with different settings ({' / '.join(settings)}), which must not be averaged; "
            "draw from a results folder with one retraining of each group",
        )
    carried = carry_forward(rows)
    curves = over_seeds(carried, by=[*GROUP, "split", "epoch"], value="accuracy")
    if curves.is_empty():
        return Skipped(name, "table retraining has no finite accuracy of these runs; look at their losses")
    source, reset_epoch = source_of("retraining", rows), rows["reset_epoch"][0]
    state = "initialization" if reset_epoch == 0 else f"its parameters after epoch {reset_epoch}"
    fewer = of_fewer_runs(curves, source.n_runs, by=["split", "epoch", "group"])
    caption = (
        f"Accuracy on clean, noisy and test examples while one layer group alone (a panel each, by depth), put back to "
        f"{state}, is trained anew on {kind} examples only, everything else frozen, for {cell.title}; epoch 0 is "
        f"before retraining. {spread_over(source.seeds)}{fewer} {_name_carried(carried)}{judged_on(rows, SPLITS)} "
        f"{_name_recovery(curves)}"
    )
    what = f"retrained on {kind} examples" + (f", from epoch {reset_epoch}" if reset_epoch else "")
    heading = "Figure 4, layer retraining" if kind == "clean" else "Control of Figure 4, retraining on noisy examples"
    return Drawn(_plot(f"{cell.title}\n{what}", curves), name, f"{heading}: {cell.title}", caption, source)


def _settings_of_units(results: Results, rows: pl.DataFrame) -> pl.DataFrame:
    """Return unit_id and settings, in words, of the units that wrote the rows."""
    units = results.units(rows["unit_id"].unique()).select("unit_id", "settings")
    words = {settings: _spell_settings(settings) for settings in units["settings"].unique()}
    return units.with_columns(pl.col("settings").replace_strict(words, return_dtype=pl.String))


def _spell_settings(settings: str) -> str:
    """Return what a unit's settings (JSON) have other than the defaults, e.g. "epochs=10"; its subject left out."""
    chosen = {name: value for name, value in json.loads(settings).items() if name not in _NOT_SETTINGS}
    return ", ".join(f"{name}={value}" for name, value in sorted(chosen.items())) or "the defaults"


def _on_most_examples(rows: pl.DataFrame) -> pl.DataFrame:
    """Return each group's retraining of a run by the unit that judged it on most examples (of several limits)."""
    unit = ["run_id", *GROUP, "unit_id"]
    judged = rows.filter(epoch=0).group_by(unit).agg(n_judged=pl.col("n").sum())
    most = judged.filter(pl.col("n_judged") == pl.col("n_judged").max().over("run_id", *GROUP))
    return rows.join(most, on=unit, how="semi")


def _name_carried(carried: pl.DataFrame) -> str:
    """Return how many retrainings (of one group in one run) ended before the longest of their group."""
    retrainings = carried.group_by("run_id", *GROUP).agg(pl.col("is_carried").any())
    n_carried = retrainings["is_carried"].sum()
    if n_carried == 0:
        return ""
    return (
        f"{n_carried} of {count(retrainings.height, 'retraining')} stopped earlier than the longest of their group; "
        "their last value is carried forward. "
    )


def _name_recovery(curves: pl.DataFrame) -> str:
    last = curves.filter(pl.col("epoch") == pl.col("epoch").max().over(GROUP))
    noisy = last.filter(split="noisy")
    if noisy.is_empty():
        return "There are no noisy examples."
    both = noisy.join(last.filter(split="clean"), on=GROUP, suffix="_clean")
    n_back = (both["mean"] >= both["mean_clean"] / 2).sum()
    low, high = (noisy.sort("mean", maintain_order=True).row(place, named=True) for place in (0, -1))
    return (
        f"At the end noisy accuracy is at least half of clean accuracy in {n_back} of {count(both.height, 'group')}; "
        f"it is highest in {high['group']} ({mean_and_std(high['mean'], high['std'])}) and lowest in {low['group']} "
        f"({mean_and_std(low['mean'], low['std'])})."
    )


def _plot(title: str, curves: pl.DataFrame) -> Figure:
    groups = curves.select(GROUP).unique().sort(GROUP)
    n_columns, width = (min(3, groups.height), COLUMN_WIDTH) if groups.height <= _MOST_PANELS else (6, PAGE_WIDTH)
    n_rows = -(-groups.height // n_columns)
    with house_style():
        figure = new_figure(title, height=0.9 + 0.95 * n_rows, width=width)
        grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        fix_range(grid[0, 0], 0, curves["epoch"].to_numpy().max())
        titles = short_names(groups["group"].to_list(), _LONGEST_TITLE)
        for axes, group, title in zip(grid.flat, groups.iter_rows(named=True), titles, strict=False):
            _plot_group(axes, curves.filter(**group))
            axes.set_title(title, pad=2)
        _name_axes(grid, groups.height)
        place_legend_below(figure, grid[0, 0])
    return figure


def _plot_group(axes: Axes, curves: pl.DataFrame) -> None:
    for split in SPLITS:
        curve = curves.filter(split=split)
        if not curve.is_empty():
            plot_mean(axes, curve, x="epoch", stroke=_STROKES[split], label=split)


def _name_axes(grid: np.ndarray, n_panels: int) -> None:
    """Name the axes once a row and once a column, below its last panel; leave places without a panel empty."""
    for axes in grid.flat[n_panels:]:
        axes.set_axis_off()
    for axes in grid.flat[:n_panels][-grid.shape[1] :]:
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        label_epochs(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy")
