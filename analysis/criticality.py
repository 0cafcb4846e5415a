"""E2 at a glance: are the groups that noisy examples need the last ones, or those that clean examples need?

Paper: no figure of it; a summary of layer rewinding (Figure 3) at initialization.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import count, judged_on, mean_and_std, spread_over_seeds_of
from analysis.cells import GROUP, Comparison, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, source_of
from analysis.load import Results
from analysis.means import spread_of
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
    STROKES,
    column_titles,
    height_of_labels,
    house_style,
    label_groups,
    new_figure,
    place_legend_below,
    width_for,
)

_KINDS = ("clean", "noisy")
_BAR = 0.4  # of the distance between two groups
_FEWEST_GROUPS = 3  # two are in the same order or in the opposite one; that says nothing


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield, one a dataset and setting, the drop in clean and in noisy accuracy with one group at initialization."""
    rows = rewound_alone(results).filter(pl.col("rewind_epoch") == 0, pl.col("split").is_in(_KINDS))
    missing = results.missing("rewinding", "of single groups at epoch 0 with batchnorm final")
    draw_part = partial(_draw, results=results)
    return draw_each_batchnorm("criticality", rows, results.comparisons, draw_part, missing=missing)


def rank_correlation(a: pl.Series, b: pl.Series) -> float | None:
    """Return Spearman's rank correlation, ties sharing their mean rank.

    None where it says nothing: fewer than three pairs, or all values of one side alike.
    """
    ranks = pl.DataFrame([a.rename("a"), b.rename("b")]).drop_nulls().select(pl.all().rank("average"))
    if ranks.height < _FEWEST_GROUPS or 1 in (ranks["a"].n_unique(), ranks["b"].n_unique()):
        return None
    return ranks.select(pl.corr("a", "b")).item()


def _draw(name: str, comparison: Comparison, rows: pl.DataFrame, *, batchnorm: str, results: Results) -> Outcome:
    drops = over_seeds(_drops(rows, final_accuracies(results, rows)), by=["model", "split", *GROUP], value="drop")
    if drops.is_empty():
        return Skipped(name, "table epochs has no accuracy of the final models of these runs to compare with")
    models = {model: drops.filter(model=model) for model in comparison.models if model in drops["model"]}
    correlations = {model: _correlate(drop) for model, drop in models.items()}
    found = " ".join(_name_critical(model, models[model], correlations[model]) for model in models)
    spread = spread_over_seeds_of(rows, drops, by=["split", "group"])
    caption = (
        "Drop in accuracy on clean and on noisy examples when one layer group of the final model (x axis, by depth) is "
        f"put back to its parameters at initialization; {statistics_of(batchnorm)}. {spread} "
        f"{judged_on(rows, _KINDS)} The final model's accuracy is on all.{mode_of(results, rows)} "
        f"ρ is Spearman's rank correlation over the groups. {found}"
    )
    titles = column_titles(comparison.models, models)
    figure = _plot(
        title_of(comparison.title, batchnorm), models, [_head(t, *correlations[m]) for m, t in titles.items()]
    )
    heading = heading_of("Criticality of layer groups", batchnorm)
    return Drawn(figure, name, f"{heading}: {comparison.title}", caption, source_of("rewinding", rows))


def _drops(rows: pl.DataFrame, finals: pl.DataFrame) -> pl.DataFrame:
    finals = finals.select("run_id", "split", final="accuracy")
    return rows.join(finals, on=["run_id", "split"]).with_columns(drop=pl.col("final") - pl.col("accuracy"))


def _correlate(drops: pl.DataFrame) -> tuple[float | None, float | None]:
    """Return the rank correlations of the noisy with the clean drop, and of the noisy drop with depth."""
    noisy = drops.filter(split="noisy")
    both = noisy.join(drops.filter(split="clean"), on=GROUP, suffix="_clean")
    return rank_correlation(both["mean"], both["mean_clean"]), rank_correlation(noisy["mean"], noisy["group_index"])


def _name_critical(model: str, drops: pl.DataFrame, correlations: tuple[float | None, float | None]) -> str:
    highest = drops.sort("mean", descending=True, maintain_order=True).unique("split", keep="first")
    named = [
        f"for {row['split']} examples in {row['group']} ({mean_and_std(row['mean'], row['std'])})"
        for row in highest.sort("split").iter_rows(named=True)
    ]
    with_clean, with_depth = (_spell(correlation) for correlation in correlations)
    return (
        f"{model}, {count(drops['group'].n_unique(), 'group')}: the drop is largest {' and '.join(named)}; "
        f"ρ of noisy and clean drop {with_clean}, of noisy drop and depth {with_depth}."
    )


def _head(title: str, with_clean: float | None, with_depth: float | None) -> str:
    found = f"noisy and clean drop: ρ = {_spell(with_clean)}\nnoisy drop and depth: ρ = {_spell(with_depth)}"
    return f"{title}\n{found}" if title else found


def _spell(correlation: float | None) -> str:
    return "undefined" if correlation is None else f"{correlation:+.2f}".replace("-", "−")


def _plot(title: str, models: dict[str, pl.DataFrame], heads: list[str]) -> Figure:
    width = width_for(len(models))
    with house_style():
        names = {name for drops in models.values() for name in drops["group"].unique()}
        figure = new_figure(title, height=2.6 + height_of_labels(names), width=width)
        (panels,) = figure.subplots(1, len(models), sharey=True, squeeze=False)
        for axes, drops, head in zip(panels, models.values(), heads, strict=True):
            _plot_drops(axes, drops, width=width / len(models))
            axes.set_title(head)
        panels[0].set_ylabel("drop in accuracy")
        figure.align_xlabels(panels)
        place_legend_below(figure, panels[0])
    return figure


def _plot_drops(axes: Axes, drops: pl.DataFrame, *, width: float) -> None:
    groups = drops.select(GROUP).unique().sort(GROUP).with_row_index("place")
    for kind, side in zip(_KINDS, (-0.5, 0.5), strict=True):
        chosen = drops.filter(split=kind).join(groups, on=GROUP, maintain_order="left")
        axes.bar(
            chosen["place"].to_numpy() + side * _BAR,
            chosen["mean"].to_numpy(),
            width=_BAR,
            yerr=spread_of(chosen),
            color=STROKES[kind].colour,
            hatch="////" if kind == "noisy" else None,
            edgecolor="white",
            linewidth=0,
            error_kw={"elinewidth": 0.8, "capsize": 1.2},
            label=kind,
        )
    axes.axhline(0, color=REFERENCE.colour, linewidth=0.6)
    axes.grid(axis="x", visible=False)
    label_groups(axes, groups["group"].to_list(), width=width)
    axes.set_xlim(-0.6, groups.height - 0.4)
    axes.set_xlabel("layer group, by depth")
