"""Learning curves: when is the noise memorized, and what does the test set see of it?

Paper: they stand beside Figure 3 (layer rewinding).
Deviations: the test set, the loss and the spread over seeds are shown too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import mean_and_std, of_fewer_runs, spread_over
from analysis.cells import Cell, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, draw_each, source_of
from analysis.load import Results
from analysis.means import SPLITS, plot_mean
from analysis.style import STROKES, house_style, label_epochs, new_figure, place_legend, use_log_scale

_MEMORIZED = (0.5, 0.95)  # accuracies on noisy examples whose epoch the caption names


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield accuracy and loss per epoch on clean, noisy and test examples, one figure a cell of main runs."""
    cells = [cell for cell in results.cells if cell.is_main]
    return draw_each("learning_curves", results.epochs, cells, _draw_cell, missing=results.missing("epochs"))


def _draw_cell(name: str, cell: Cell, rows: pl.DataFrame) -> Outcome:
    accuracy = over_seeds(rows, by=["split", "epoch"], value="accuracy")
    loss = over_seeds(rows, by=["split", "epoch"], value="loss")
    if accuracy.is_empty() or loss.is_empty():
        return Skipped(name, "table epochs has no finite accuracy or loss of these runs; look at their losses")
    source = source_of("epochs", rows)
    points = pl.concat(part.with_columns(curve=pl.lit(name)) for name, part in (("accuracy", accuracy), ("loss", loss)))
    fewer = of_fewer_runs(points, source.n_runs, by=["curve", "split", "epoch"])
    caption = f"Accuracy (top) and loss (bottom) after each epoch, 0 being before training, for {cell.title}. "
    caption += f"{spread_over(source.seeds)}{fewer} {_name_memorization(accuracy)} {_name_final(accuracy)}"
    return Drawn(_plot(cell.title, accuracy, loss), name, f"Learning curves: {cell.title}", caption, source)


def _plot(title: str, accuracy: pl.DataFrame, loss: pl.DataFrame) -> Figure:
    with house_style():
        figure = new_figure(title, height=3.5)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _plot_curves(top, accuracy)
        _plot_curves(bottom, loss)
        top.set_ylim(-0.03, 1.03)
        top.set_ylabel("accuracy")
        bottom.set_ylabel("loss (nats)")
        label_epochs(bottom)
        if _is_wide(loss["mean"].to_numpy()):
            use_log_scale(bottom, [*loss["mean"], *(loss["mean"] + loss["std"].fill_null(0))])
        place_legend(top)
    return figure


def _is_wide(values: np.ndarray) -> bool:
    return bool(values.max() > 30 * values.min() > 0)


def _plot_curves(axes: Axes, curves: pl.DataFrame) -> None:
    for split in SPLITS:
        curve = curves.filter(pl.col("split") == split)
        if not curve.is_empty():
            plot_mean(axes, curve, x="epoch", stroke=STROKES[split], label=split)


def _name_memorization(accuracy: pl.DataFrame) -> str:
    noisy = accuracy.filter(pl.col("split") == "noisy")
    if noisy.is_empty():
        return "There are no noisy examples."
    firsts = [(share, noisy.filter(pl.col("mean") >= share)["epoch"].min()) for share in _MEMORIZED]
    reached = [f"does not reach {share}" if e is None else f"reaches {share} in epoch {e}" for share, e in firsts]
    return f"Mean accuracy on noisy examples {' and '.join(reached)}."


def _name_final(accuracy: pl.DataFrame) -> str:
    last = accuracy.filter(pl.col("epoch") == pl.col("epoch").max())
    found = {row["split"]: mean_and_std(row["mean"], row["std"]) for row in last.iter_rows(named=True)}
    finals = ", ".join(f"{split} {found[split]}" for split in SPLITS if split in found)
    return f"Accuracy after epoch {last['epoch'][0]}: {finals}."
