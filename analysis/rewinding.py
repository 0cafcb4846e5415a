"""E2: which layer groups can go back in time, and what is forgotten when they do?

Paper: layer rewinding, Figure 3.
Deviations: test examples have a row of their own; the final model and the spread over seeds are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.captions import judged_on, mean_and_std, spread_over_seeds_of
from analysis.cells import GROUP, Comparison, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, source_of
from analysis.load import Results
from analysis.means import SPLITS, plot_mean
from analysis.rewound import (
    draw_each_batchnorm,
    final_accuracies,
    heading_of,
    mode_of,
    rewound_alone,
    statistics_of,
    title_of,
)
from analysis.style import (
    REFERENCE,
    Stroke,
    column_titles,
    fix_range,
    height_of_labels,
    house_style,
    in_sequence,
    label_groups,
    new_figure,
    width_for,
)

_MOST_MARKED = 30  # groups; points of more run into each other
_MOST_EPOCHS_NAMED = 12  # in the legend


@dataclass(frozen=True, eq=False)
class _Curves:
    """Means over seeds: columns model, split, rewind_epoch, group_index, group; and of the final models."""

    rewound: pl.DataFrame
    final: pl.DataFrame

    def of_model(self, model: str) -> _Curves:
        return _Curves(self.rewound.filter(model=model), self.final.filter(model=model))


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield Figure 3, one a dataset and setting: accuracy with one group rewound, by group, epoch and model."""
    rows = rewound_alone(results)
    missing = results.missing("rewinding", "of single groups with batchnorm final")
    draw_part = partial(_draw, results=results)
    return draw_each_batchnorm("figure3", rows, results.comparisons, draw_part, missing=missing)


def _draw(name: str, comparison: Comparison, rows: pl.DataFrame, *, batchnorm: str, results: Results) -> Outcome:
    rewound = over_seeds(rows, by=["model", "split", "rewind_epoch", *GROUP], value="accuracy")
    if rewound.is_empty():
        return Skipped(name, "table rewinding has no finite accuracy of these runs; look at their losses")
    curves = _Curves(rewound, over_seeds(final_accuracies(results, rows), by=["model", "split"], value="accuracy"))
    models = [model for model in comparison.models if model in rewound["model"]]
    shown = f"{mode_of(results, rows)} {spread_over_seeds_of(rows, rewound, by=['split', 'rewind_epoch', 'group'])}"
    caption = (
        "Accuracy on clean, noisy and test examples (rows) when one layer group of the final model (x axis, by depth) "
        "is put back to its parameters after the epoch of the line's colour, 0 being initialization; "
        f"{statistics_of(batchnorm)}. The grey line is the final model, on all examples.{shown} "
        f"{judged_on(rows, SPLITS)} {' '.join(_name_critical(curves.of_model(model), model) for model in models)}"
    )
    figure = _plot(title_of(comparison.title, batchnorm), column_titles(comparison.models, models), curves)
    heading = heading_of("Figure 3, layer rewinding", batchnorm)
    return Drawn(figure, name, f"{heading}: {comparison.title}", caption, source_of("rewinding", rows))


def _name_critical(curves: _Curves, model: str) -> str:
    """Return which group of a model costs most accuracy when rewound to the first epoch there is."""
    first = curves.rewound.filter(pl.col("rewind_epoch") == pl.col("rewind_epoch").min())
    lowest = first.sort("mean", maintain_order=True).unique("split", keep="first", maintain_order=True)
    found = {
        row["split"]: f"{row['split']} accuracy in {row['group']} ({mean_and_std(row['mean'], row['std'])} is left)"
        for row in lowest.iter_rows(named=True)
    }
    named = " and ".join(found[split] for split in ("clean", "noisy") if split in found)
    return f"Rewound to epoch {first['rewind_epoch'][0]}, {model} loses most {named}."


def _plot(title: str, models: dict[str, str], curves: _Curves) -> Figure:
    """Return the figure; `models` gives each model the title of its column."""
    splits = [split for split in SPLITS if split in curves.rewound["split"]]
    epochs = curves.rewound["rewind_epoch"].unique().sort().to_list()
    strokes = dict(zip(epochs, in_sequence(len(epochs)), strict=True))
    width = width_for(len(models))
    with house_style():
        height = 1 + 1.15 * len(splits) + height_of_labels(curves.rewound["group"].unique())
        figure = new_figure(title, height=height, width=width)
        grid = figure.subplots(len(splits), len(models), sharex="col", sharey=True, squeeze=False)
        for column, (model, column_title) in zip(grid.T, models.items(), strict=True):
            _plot_model(column, splits, curves.of_model(model), strokes, width=width / len(models))
            column[0].set_title(column_title)
        for axes, split in zip(grid[:, 0], splits, strict=True):
            axes.set_ylabel(f"accuracy, {split}")
        figure.align_xlabels(grid[-1])
        _place_legend(figure, strokes, n_columns=5 if len(models) == 1 else 7)
    return figure


def _plot_model(
    column: Sequence[Axes], splits: Sequence[str], curves: _Curves, strokes: dict[int, Stroke], *, width: float
) -> None:
    groups = curves.rewound.select(GROUP).unique().sort(GROUP).with_row_index("place")
    rewound = curves.rewound.join(groups, on=GROUP, maintain_order="left")
    fix_range(column[0], 0, groups.height - 1)
    for axes, split in zip(column, splits, strict=True):
        for final in curves.final.filter(split=split)["mean"]:
            axes.axhline(final, color=REFERENCE.colour, linewidth=REFERENCE.width)
        for epoch, stroke in strokes.items():
            curve = rewound.filter(split=split, rewind_epoch=epoch)
            plot_mean(axes, curve, x="place", stroke=stroke, label=str(epoch), marked=groups.height <= _MOST_MARKED)
    label_groups(column[-1], groups["group"].to_list(), width=width)
    column[-1].set_xlabel("layer group, by depth")


def _place_legend(figure: Figure, strokes: dict[int, Stroke], *, n_columns: int) -> None:
    """Put a legend of the epochs below everything; every so many of them where they are too many."""
    epochs = list(strokes)
    step = -(-len(epochs) // _MOST_EPOCHS_NAMED)
    named = np.unique([*range(0, len(epochs), step), len(epochs) - 1])
    handles = [
        Line2D([], [], color=strokes[epochs[i]].colour, marker="o", markersize=3, label=str(epochs[i])) for i in named
    ]
    handles.append(Line2D([], [], color=REFERENCE.colour, linewidth=REFERENCE.width, label="final model"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=n_columns, title="rewound to epoch", title_fontsize=7.5
    )
