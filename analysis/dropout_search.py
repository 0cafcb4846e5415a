"""E5: which settings of example-tied dropout were tried, what they forget and what they generalize to.

Paper: no figure of it; Table 1 has one setting a data set, and does not say which.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.captions import count
from analysis.cells import Cell, find_cells
from analysis.drawn import Drawn, Options, Outcome, Skipped, draw_each, source_of
from analysis.load import Results
from analysis.settings import label_searches
from analysis.style import MISSING, PAGE_WIDTH, SEQUENCE, STROKES, house_style, new_figure, short_names
from memlib.model_selection import (
    CONTROL_AXES,
    Row,
    best_setting,
    controls_of,
    gains_on_dropping,
    gains_on_test,
    mean_of,
    paper_gain,
)

_PANEL = ("width", "after", "peak_lr")  # what one row of panels has in common
_SHOWN = {"noisy_accuracy": "noisy training examples", "test_accuracy": "test examples"}
_IN_WORDS = {"width": "width", "peak_lr": "peak rate"}
_LONGEST_HEAD = 42  # characters above a panel
_LIGHT = 0.6  # of the colours' range: above, they are too light for white text


@dataclass(frozen=True, eq=False)
class _Grid:
    """One heat map: values [p_gen, p_mem], NaN where nothing was tried; epochs where a trial was stopped, else 0."""

    p_gen: list[float]
    p_mem: list[float]
    values: np.ndarray
    stopped_after: np.ndarray
    best: tuple[float, float] | None


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield, one a search, noisy and test accuracy with the memorization neurons dropped, p_gen by p_mem."""
    trials = results.trials
    labels = label_searches(trials.select("dataset", "model", "config").iter_rows())
    trials = trials.with_columns(setting=pl.Series(labels, dtype=pl.String))
    return draw_each("dropout_search", trials, find_cells(trials), _draw_cell, missing=None)


def _draw_cell(name: str, cell: Cell, rows: pl.DataFrame) -> Outcome:
    records = rows.to_dicts()
    best = best_setting(records)
    trials = rows.filter(dropout="example_tied", batchnorm="final")
    if trials.is_empty():
        return Skipped(name, "no trial with dropout has ended yet; run the same search again to continue it")
    source = source_of("dropout_search", rows)
    n_stopped = trials.filter("stopped_early").height
    caption = (
        "Accuracy with the memorization neurons dropped, of noisy training examples (left; against their wrong label, "
        f"so lower is better) and of test examples (right), for {cell.title}: {count(trials.height, 'trial')}, "
        f"{n_stopped} of them stopped early, which are hatched and judged after the epochs in brackets. Grey: no "
        f"result. {_tell_seeds(trials)} {_tell_best(best, records, cell.dataset)}"
    )
    figure = _plot(f"{cell.title}\nmemorization neurons dropped", trials, records, best)
    return Drawn(figure, name, f"Search for settings of example-tied dropout: {cell.title}", caption, source)


def _tell_seeds(trials: pl.DataFrame) -> str:
    """Say what a cell's number is a mean of; of trials that were trained to the end, if there is one."""
    if trials["seed"].n_unique() == 1:
        return "One seed."
    return "A cell is the mean over the seeds that were tried, of trials trained to the end if there are any."


def _tell_best(best: Sequence[Row], rows: Sequence[Row], dataset: str) -> str:
    if not best:
        return "No trial was trained to the end."
    first = best[0]
    chosen = (
        f"Framed: best by validation on held-out training examples with noisy labels ({_percent(best, 'validation')}, "
        f"BatchNorm statistics {first['batchnorm']}), p_gen {first['p_gen']:g}, p_mem {first['p_mem']:g}: clean "
        f"{_percent(best, 'clean')}, noisy {_percent(best, 'noisy')}, test {_percent(best, 'test')}."
    )
    own = gains_on_dropping(best, rows)
    if own:
        chosen += (
            f" Dropping changes its own test accuracy by {100 * sum(own) / len(own):+.1f} points (the paper's Table 1: "
            f"{paper_gain(dataset)})."
        )
    controls = controls_of(best, rows)
    if not controls:
        return f"{chosen} Its control without dropout is not finished."
    gains = gains_on_test(best, rows)
    over = "" if len(gains) == len(best) else f" over {count(len(gains), 'seed')}"
    return (
        f"{chosen} Without dropout at the same budget: noisy {_percent(controls, 'noisy')}, test "
        f"{_percent(controls, 'test')}; the gain on test over that is {100 * sum(gains) / len(gains):+.1f} points"
        f"{over}."
    )


def _percent(rows: Sequence[Row], split: str) -> str:
    values = [row for row in rows if row[f"{split}_accuracy"] is not None]
    return f"{100 * mean_of(values, f'{split}_accuracy'):.1f} %" if values else "none"


def _plot(title: str, trials: pl.DataFrame, rows: Sequence[Row], best: Sequence[Row]) -> Figure:
    panels = trials.select(_PANEL).unique().sort(_PANEL).to_dicts()
    named = [name for name in _PANEL if name == "width" or trials[name].n_unique() > 1]
    n_rows = trials["p_gen"].n_unique()
    per_panel = 0.85 + 0.3 * n_rows + 0.12 * ("after" in named)
    with house_style():
        figure = new_figure(title, height=0.5 + len(panels) * per_panel, width=PAGE_WIDTH)
        axes = figure.subplots(len(panels), len(_SHOWN), squeeze=False)
        for column, (measure, shown) in enumerate(_SHOWN.items()):
            ends = _range(trials[measure])
            for panel, place in zip(panels, axes[:, column], strict=True):
                _plot_grid(place, _grid(trials.filter(**panel), measure, panel, best), ends)
                place.set_title(f"{shown}\n{_head(panel, named)}; {_tell_control(panel, measure, rows)}")
            figure.colorbar(
                ScalarMappable(Normalize(*ends), SEQUENCE),
                ax=axes[:, column],
                label="accuracy",
                aspect=18 * len(panels),
                pad=0.02,
            )
        for place in axes[:, 0]:
            place.set_ylabel("p_gen")
        for place in axes[-1]:
            place.set_xlabel("p_mem")
    return figure


def _head(panel: dict[str, typing.Any], named: Sequence[str]) -> str:
    """Return what sets a panel apart, with its places in a line of their own: they may be many."""
    settings = [", ".join(f"{_IN_WORDS[name]} {panel[name]}" for name in named if name != "after")]
    if "after" in named:
        settings = short_names([f"after {panel['after'] or 'own places'}"], _LONGEST_HEAD) + settings
    return "\n".join(settings)


def _tell_control(panel: dict[str, typing.Any], measure: str, rows: Sequence[Row]) -> str:
    controls = [r for r in rows if r["dropout"] == "none" and all(r[name] == panel[name] for name in CONTROL_AXES)]
    values = [row for row in controls if row[measure] is not None]
    return f"no dropout: {mean_of(values, measure):.3f}" if values else "no control yet"


def _grid(trials: pl.DataFrame, measure: str, panel: dict[str, typing.Any], best: Sequence[Row]) -> _Grid:
    ended = ~pl.col("stopped_early")
    counted = trials.filter(ended | ~ended.any().over("p_gen", "p_mem"))
    means = counted.group_by("p_gen", "p_mem").agg(
        value=pl.col(measure).mean(), epochs=pl.when("stopped_early").then("epochs").min().fill_null(0)
    )
    p_gen, p_mem = sorted(trials["p_gen"].unique()), sorted(trials["p_mem"].unique())
    values, stopped_after = np.full((len(p_gen), len(p_mem)), np.nan), np.zeros((len(p_gen), len(p_mem)), dtype=int)
    for row in means.iter_rows(named=True):
        place = p_gen.index(row["p_gen"]), p_mem.index(row["p_mem"])
        values[place] = np.nan if row["value"] is None else row["value"]
        stopped_after[place] = row["epochs"]
    is_here = bool(best) and all(best[0][name] == panel[name] for name in _PANEL)
    return _Grid(p_gen, p_mem, values, stopped_after, (best[0]["p_gen"], best[0]["p_mem"]) if is_here else None)


def _range(values: pl.Series) -> tuple[float, float]:
    """Return the accuracies at the ends of the colours: those there are, rounded outwards to a tenth."""
    low, high = (typing.cast(float, end or 0.0) for end in (values.min(), values.max()))
    low, high = np.floor(10 * low) / 10, np.ceil(10 * high) / 10
    return (low, high) if low < high else (low, low + 0.1)


def _plot_grid(axes: Axes, grid: _Grid, ends: tuple[float, float]) -> None:
    low, high = ends
    colours = colormaps[SEQUENCE].with_extremes(bad=MISSING)
    values = np.ma.masked_invalid(grid.values)
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.set_xticks(range(len(grid.p_mem)), [f"{p:g}" for p in grid.p_mem])
    axes.set_yticks(range(len(grid.p_gen)), [f"{p:g}" for p in grid.p_gen])
    for (row, column), value in np.ndenumerate(grid.values):
        if np.isfinite(value):
            share = (value - low) / (high - low)
            ink, paper = "white" if share < _LIGHT else "black", to_hex(colours(share))
            _write(axes, (column, row), value, int(grid.stopped_after[row, column]), (ink, paper))
    if grid.best is not None:
        _frame(axes, grid.p_mem.index(grid.best[1]), grid.p_gen.index(grid.best[0]))


def _write(axes: Axes, place: tuple[int, int], value: float, stopped_after: int, look: tuple[str, str]) -> None:
    """Write a value into its cell, in ink on paper, and hatch the cell of a trial that was stopped early."""
    ink, paper = look
    text = f"{value:.3f}" + (f" [{stopped_after}]" if stopped_after else "")
    label = axes.text(*place, text, ha="center", va="center", color=ink, fontsize=6.5)
    if stopped_after:
        label.set_bbox({"facecolor": paper, "linewidth": 0, "pad": 1.2})
        corner = (place[0] - 0.5, place[1] - 0.5)
        axes.add_patch(
            Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=ink, linewidth=0, alpha=0.35, zorder=2)
        )


def _frame(axes: Axes, column: int, row: int) -> None:
    axes.add_patch(
        Rectangle(
            (column - 0.47, row - 0.47),
            0.94,
            0.94,
            fill=False,
            edgecolor=STROKES["noisy"].colour,
            linewidth=2,
            zorder=3,
        )
    )
