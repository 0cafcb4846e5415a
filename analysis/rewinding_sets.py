"""E2 with several groups rewound at once: what do they hold together?

Paper: no figure of it; the sets are those asked for in the settings, such as conv4+classifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import polars as pl
from matplotlib.figure import Figure

from analysis.captions import judged_on, mean_and_std, of_fewer_runs, spread_over
from analysis.cells import GROUP, Cell, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, source_of
from analysis.load import Results
from analysis.means import SPLITS, spread_of
from analysis.rewound import draw_each_batchnorm, heading_of, rewound_alone, rewound_together, statistics_of, title_of
from analysis.style import STROKES, house_style, label_groups, new_figure, place_legend_below

_SET = ["group_index", "n_groups", "group"]
_LONGEST_LABEL = 26  # characters
_DODGE = 0.2  # of the distance between two sets, so that error bars lie side by side


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield, one a cell that has such rows, the accuracies with several groups rewound at once."""
    draw_part = partial(_draw, alone=rewound_alone(results))
    return draw_each_batchnorm("rewinding_sets", rewound_together(results), results.cells, draw_part, missing=None)


def _draw(name: str, cell: Cell, rows: pl.DataFrame, *, batchnorm: str, alone: pl.DataFrame) -> Outcome:
    rows = rows.filter(pl.col("rewind_epoch") == pl.col("rewind_epoch").min())
    accuracies = over_seeds(rows, by=[*_SET, "split"], value="accuracy")
    if accuracies.is_empty():
        return Skipped(name, "table rewinding has no finite accuracy of these runs; look at their losses")
    source, epoch = source_of("rewinding", rows), rows["rewind_epoch"][0]
    depths = cell.rows(alone).select(GROUP).unique().sort(GROUP)["group"].to_list()
    caption = (
        "Accuracy when several layer groups at once (a row each) are put back to their parameters after epoch "
        f"{epoch}, 0 being initialization; {statistics_of(batchnorm)}; for {cell.title}. {spread_over(source.seeds)}"
        f"{of_fewer_runs(accuracies, source.n_runs, by=['split', 'group'])} {judged_on(rows, SPLITS)} "
        f"{_name_range(accuracies, depths)}"
    )
    figure = _plot(title_of(f"{cell.title}\nrewound to epoch {epoch}", batchnorm), accuracies, depths)
    heading = heading_of("Several groups rewound at once", batchnorm)
    return Drawn(figure, name, f"{heading}: {cell.title}", caption, source)


def _name_range(accuracies: pl.DataFrame, depths: Sequence[str]) -> str:
    """Return on which sets clean and noisy accuracy are lowest and highest."""
    ranges = []
    for split in ("clean", "noisy"):
        ordered = accuracies.filter(split=split).sort("mean", maintain_order=True).rows(named=True)
        ends = [f"{mean_and_std(row['mean'], row['std'])} ({_name_set(row['group'], depths)})" for row in ordered]
        if ends:
            ranges.append(f"{split} accuracy from {ends[0]} to {ends[-1]}")
    return f"Over the sets, {' and '.join(ranges)}."


def _plot(title: str, accuracies: pl.DataFrame, depths: Sequence[str]) -> Figure:
    sets = accuracies.select(_SET).unique().sort(_SET).with_row_index("place")
    placed = accuracies.join(sets, on=_SET, maintain_order="left")
    with house_style():
        figure = new_figure(title, height=min(1.4 + 0.2 * sets.height, 7.5))
        axes = figure.subplots()
        for split, shift in zip(SPLITS, (-_DODGE, 0, _DODGE), strict=True):
            chosen, stroke = placed.filter(split=split), STROKES[split]
            if chosen.is_empty():
                continue
            axes.errorbar(
                chosen["mean"].to_numpy(),
                chosen["place"].to_numpy() + shift,
                xerr=spread_of(chosen),
                fmt=stroke.marker,
                color=stroke.colour,
                markersize=3,
                elinewidth=0.8,
                label=split,
            )
        names = [_name_set(name, depths) for name in sets["group"]]
        label_groups(axes, names, vertical=True, longest=_LONGEST_LABEL)
        axes.set_ylim(sets.height - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("accuracy")
        axes.set_ylabel("groups rewound together")
        place_legend_below(figure, axes)
    return figure


def _name_set(name: str, depths: Sequence[str]) -> str:
    """Return e.g. "conv1 to res1.conv2" for three groups or more that follow each other in depth, else the name."""
    members = name.split("+")
    if len(members) < 3 or members[0] not in depths:
        return name
    first = depths.index(members[0])
    return f"{members[0]} to {members[-1]}" if members == [*depths[first : first + len(members)]] else name
