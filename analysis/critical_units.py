"""E4: how few units carry one example, what does losing them cost the others, and where are they?

Paper: Figure 5.
Deviations: whole distributions as falling curves instead of histograms, for the kinds may differ in the tail
alone; examples that did not flip are shown; the layers stand beside their share of all units.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import judged_on, kinds_of_fewer_runs, mean_and_std, spread_over
from analysis.cells import Cell, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, source_of
from analysis.flips import FLIPS, none_flipped, plot_flips, spell_flips, spell_mean
from analysis.load import Results
from analysis.means import plot_mean, plot_means
from analysis.rank_test import spell_test
from analysis.searched import (
    KINDS,
    draw_each_search,
    heading_of,
    how_searched,
    not_skipped,
    removed_units,
    searched_examples,
    title_of,
)
from analysis.shares import fix_shares, mark_median, median_of, plot_share_above, shares_above
from analysis.style import (
    PAGE_WIDTH,
    REFERENCE,
    STROKES,
    height_of_labels,
    house_style,
    label_groups,
    new_figure,
    place_legend_below,
)

_LAYER = ["layer_index", "layer"]
_SMALLEST_DROP = 0.001  # the axis of drops is linear up to here, logarithmic beyond
_MOST_MARKED = 30  # layers; markers of more run into each other
_DROPS = (-1, -0.1, -0.01, 0, 0.001, 0.01, 0.1, 1)


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield Figure 5, one a cell and search: units removed until the flip, what it costs, and their layers."""
    rows, removed = searched_examples(results), removed_units(results)
    draw_part = partial(_draw, removed=removed)
    return draw_each_search("figure5", rows, results.cells, draw_part, missing=results.missing("critical_units"))


def layer_shares(removed: pl.DataFrame) -> pl.DataFrame:
    """Return each layer's share of a kind's removed units: kind, layer_index, layer; mean, std and n_runs over runs.

    A layer from which a run removed none has share 0 there. Kind "all units" is the layer's share of all units.
    """
    layers = removed.group_by(_LAYER).agg(pl.col("n_units").first())
    every = removed.select("run_id", "kind").unique().join(layers.select(_LAYER), how="cross")
    counts = removed.group_by("run_id", "kind", *_LAYER).agg(n=pl.len())
    counts = every.join(counts, on=["run_id", "kind", *_LAYER], how="left").with_columns(pl.col("n").fill_null(0))
    shares = counts.with_columns(share=pl.col("n") / pl.col("n").sum().over("run_id", "kind"))
    total = pl.col("n_units") / pl.col("n_units").sum()
    units = layers.select(pl.lit("all units").alias("kind"), *_LAYER, mean=total)
    found = over_seeds(shares, by=["kind", *_LAYER], value="share")
    return pl.concat([found, units], how="diagonal").sort("kind", *_LAYER)


def _draw(name: str, cell: Cell, rows: pl.DataFrame, *, search: str, removed: pl.DataFrame) -> Outcome:
    flipped = rows.filter("flipped")
    if flipped.is_empty():
        return Skipped(name, none_flipped(rows))
    source, shares = source_of("critical_units", rows), layer_shares(cell.rows(removed).filter(search=search))
    caption = (
        f"(a) For {cell.title}: {FLIPS}. (b) Share of the flipped examples whose flip costs more training accuracy "
        f"than that (before minus after). {_judged(flipped)} (c) Share of the flipped examples' removed units that "
        "lie in each layer, beside its share of all units of the layers shown. "
        f"{how_searched(rows)} {spread_over(source.seeds)}"
        f"{kinds_of_fewer_runs(not_skipped(rows), source.n_runs, what='curves of (a)')}"
        f"{kinds_of_fewer_runs(flipped, source.n_runs, what='curves of (b) and of (c)')} "
        f"Units until the flip, the mean over the flipped: {_spell_units(rows)}. Drop in training accuracy: "
        f"{_spell_drops(flipped)}. {_spell_layers(shares)}"
    )
    heading = heading_of("Figure 5, critical units of single examples", search)
    figure = _plot(title_of(cell.title, search), rows, shares)
    return Drawn(figure, name, f"{heading}: {cell.title}", caption, source)


def _kinds_of(rows: pl.DataFrame) -> list[str]:
    return [kind for kind in KINDS if kind in rows["kind"]]


def _judged(flipped: pl.DataFrame) -> str:
    numbers = pl.concat([flipped.select(split=pl.lit(kind), n=f"n_{kind}") for kind in KINDS])
    return judged_on(numbers.filter(pl.col("n") > 0), KINDS)


def _spell_units(rows: pl.DataFrame) -> str:
    test = spell_test(not_skipped(rows), KINDS, "needed")
    return "; ".join([*(spell_flips(rows, kind) for kind in _kinds_of(rows)), *filter(None, [test])])


def _spell_drops(flipped: pl.DataFrame) -> str:
    flipped = flipped.filter(pl.col("drop").is_finite())
    found = [
        f"{kind} median {median_of(flipped.filter(kind=kind)['drop']):.4f}, "
        f"{spell_mean(flipped.filter(kind=kind), 'drop')}"
        for kind in _kinds_of(flipped)
    ]
    return "; ".join([*found, *filter(None, [spell_test(flipped, KINDS, "drop")])])


def _spell_layers(shares: pl.DataFrame) -> str:
    """Return the layer each kind's units are most often in, and how far apart the kinds' shares are."""
    kinds = _kinds_of(shares)
    most = shares.sort("mean", descending=True, maintain_order=True).unique("kind", keep="first")
    rows = {row["kind"]: row for row in most.iter_rows(named=True)}
    named = [f"{kind} {rows[kind]['layer']} ({mean_and_std(rows[kind]['mean'], rows[kind]['std'])})" for kind in kinds]
    text = f"Most removed units lie in: {', '.join(named)}."
    if len(kinds) < len(KINDS):
        return text
    both = shares.filter(kind="clean").join(shares.filter(kind="noisy"), on=_LAYER)
    distance = (both["mean"] - both["mean_right"]).abs().sum() / 2
    return f"{text} The layers of the two kinds differ by {distance:.3f} in all (0 alike, 1 no layer in common)."


def _plot(title: str, rows: pl.DataFrame, shares: pl.DataFrame) -> Figure:
    with house_style():
        figure = new_figure(title, height=2.6 + 1.0 * height_of_labels(shares["layer"]), width=PAGE_WIDTH)
        flips, drops, layers = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        strokes = {kind: STROKES[kind] for kind in _kinds_of(rows)}
        plot_flips(flips, rows, strokes)
        _plot_drops(drops, rows.filter("flipped", pl.col("drop").is_finite()))
        _plot_layers(layers, shares)
        for axes, title in zip((flips, drops, layers), ("(a) units", "(b) cost", "(c) layers"), strict=True):
            axes.set_title(title)
        place_legend_below(figure, layers)
    return figure


def _plot_drops(axes: Axes, flipped: pl.DataFrame) -> None:
    curves = shares_above(flipped, "drop")
    places = curves["place"].to_numpy()
    low, high = places.min(initial=0), places.max(initial=_SMALLEST_DROP)
    axes.set_xscale("symlog", linthresh=_SMALLEST_DROP, linscale=1)
    for kind in _kinds_of(flipped):
        ends = (min(1.5 * low, -_SMALLEST_DROP / 4), 1.3 * high)
        plot_share_above(axes, curves.filter(kind=kind), STROKES[kind], ends=ends, label=kind)
        mark_median(axes, flipped.filter(kind=kind)["drop"], STROKES[kind], infinite=high)
        axes.set_xlim(*ends)
    ticks = [tick for tick in _DROPS if 1.5 * low <= tick <= 1.3 * high]
    axes.set_xticks(ticks, [f"{100 * tick:g}".replace("-", "−") for tick in ticks])
    axes.set_xticks([], minor=True)
    fix_shares(axes)
    axes.set_xlabel("drop in training accuracy, %")
    axes.set_ylabel("share with a larger drop")


def _plot_layers(axes: Axes, shares: pl.DataFrame) -> None:
    layers = shares.select(_LAYER).unique().sort(_LAYER).with_row_index("place")
    placed = shares.join(layers, on=_LAYER, maintain_order="left")
    for kind, stroke in {**{kind: STROKES[kind] for kind in _kinds_of(shares)}, "all units": REFERENCE}.items():
        chosen = placed.filter(kind=kind)
        if layers.height > _MOST_MARKED:
            plot_mean(axes, chosen, x="place", stroke=stroke, label=kind)
        else:
            plot_means(axes, chosen["place"].to_numpy(), chosen, stroke, label=kind)
    label_groups(axes, layers["layer"].to_list(), width=PAGE_WIDTH / 3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer, by depth")
    axes.set_ylabel("share of removed units")
