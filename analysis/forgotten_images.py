"""Figure 7: the clean examples that are forgotten when the memorization neurons are dropped.

Paper: Figure 7. Most of them are mislabelled in the source, ambiguous or unique.
Deviations: the most strongly forgotten ones, not a choice by hand.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial

import polars as pl
from matplotlib.figure import Figure
from matplotlib.image import imread

from analysis.drawn import Drawn, Options, Outcome, draw_each, source_of
from analysis.dropouts import TiedCell, tied_cells
from analysis.load import Results
from analysis.style import COLUMN_WIDTH, as_it_is, house_style, new_figure, short_names
from analysis.tables import Column, Table

_MOST_ROWS = 5
_MOST_COLUMNS = 7
_LONGEST_NAME = 12  # characters of a class's name
_CHARACTER = 0.049  # inches, of a label
_LABEL = 6.0  # points
_SMALLEST, _LARGEST = 0.36, 0.5  # inches, the side of an image
_GAP = 0.04  # inches, between labels
_LINE = 0.095  # inches, a line of a label


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield the most strongly forgotten clean examples as a grid, one a cell with example-tied dropout."""
    cells = tied_cells(results)
    rows = results.table("forgotten_images")
    missing = "no clean example is forgotten, or these runs are older than table forgotten_images" if cells else None
    return draw_each("figure7", rows, cells, partial(_draw, results=results), missing=missing)


def _draw(name: str, cell: TiedCell, rows: pl.DataFrame, *, results: Results) -> Outcome:
    """Show each example once, at its lowest margin where several runs forget it."""
    found = rows.sort("margin", "run_id", "example_id").unique("example_id", keep="first", maintain_order=True)
    n_columns = _columns_for(found)
    shown = found.head(_MOST_ROWS * n_columns)
    caption = (
        f"Clean training examples of {cell.title} that are predicted as assigned under their own masks and not when "
        "the memorization neurons are dropped: assigned label → new prediction. The lowest margin comes first, "
        f"{shown['margin'][0]:.1f} to {shown['margin'][-1]:.1f}. {_how_many(cell, rows, shown.height, results)}"
    )
    table = Table(
        f"Clean examples forgotten on dropping: {cell.title}",
        "Ids are positions in the source's own order of training images; margins are those without memorization "
        "neurons.",
        tuple(Column(head) for head in ("example", "assigned", "new prediction", "margin")),
        tuple(
            (str(row["example_id"]), row["assigned_name"], row["new_name"], f"{row['margin']:.2f}")
            for row in shown.iter_rows(named=True)
        ),
    )
    figure = _plot(f"{cell.title}: forgotten clean examples", shown, n_columns)
    heading = f"Figure 7: {cell.title}"
    return Drawn(figure, name, heading, caption, source_of("forgotten_images", rows), (table,))


def _how_many(cell: TiedCell, rows: pl.DataFrame, n_shown: int, results: Results) -> str:
    counted = dict(rows.select("run_id", "n_forgotten").unique().iter_rows())
    clean = cell.rows(results.table("dropout")).filter(split="clean", mode="dropped", batchnorm="final", rescaled=False)
    n_clean = dict(clean.select("run_id", "n").iter_rows())
    written = results.store.units("forgotten_images")  # by some without a row: they forget nothing
    runs = cell.rows(results.runs).filter(pl.col("run_id").is_in(written)).sort("seed", "run_id")
    parts = [
        f"{counted.get(run_id, 0)} of {n_clean[run_id]} (seed {seed})"
        if run_id in n_clean
        else f"{counted.get(run_id, 0)} (seed {seed})"
        for run_id, seed in runs.select("run_id", "seed").iter_rows()
    ]
    return f"{n_shown} shown; forgotten in all: {', '.join(parts)} clean examples."


def _columns_for(found: pl.DataFrame) -> int:
    """Return how many images fit side by side with their labels."""
    longest = max(len(line) for label in _labels(found) for line in label.split("\n"))
    width = max(_SMALLEST, _CHARACTER * longest) + _GAP
    return max(1, min(_MOST_COLUMNS, int(COLUMN_WIDTH / width)))


def _labels(shown: pl.DataFrame) -> list[str]:
    """Return "assigned → new prediction", in two lines where one is too long."""
    names = sorted({*shown["assigned_name"], *shown["new_name"]})
    short = dict(zip(names, short_names(names, _LONGEST_NAME), strict=True))
    is_short = max(len(name) for name in short.values()) <= 3
    between = " → " if is_short else "\n→ "
    pairs = shown.select("assigned_name", "new_name").iter_rows()
    return [f"{short[assigned]}{between}{short[new]}" for assigned, new in pairs]


def _plot(title: str, shown: pl.DataFrame, n_columns: int) -> Figure:
    labels = _labels(shown)
    n_rows = -(-len(labels) // n_columns)
    n_lines = 1 + max(label.count("\n") for label in labels)
    picture = min(_LARGEST, COLUMN_WIDTH / n_columns - _GAP)
    with house_style():
        figure = new_figure(title, height=0.3 + n_rows * (picture + _LINE * n_lines + 2 * _GAP))
        figure.set_layout_engine("constrained", w_pad=_GAP / 2, h_pad=_GAP / 2, wspace=0, hspace=0)
        panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
        for axes in panels:
            axes.axis("off")
        for axes, png, label in zip(panels, shown["png"], labels, strict=False):
            axes.imshow(imread(io.BytesIO(png), format="png"), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(as_it_is(label), fontsize=_LABEL, pad=1.5, linespacing=1.0)
    return figure
