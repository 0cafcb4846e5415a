"""E4, one more question: is a memorization unit one example's own? Over how many examples a unit is critical.

Paper: no figure of it; it is asked of the units behind Figure 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import polars as pl
from matplotlib.figure import Figure

from analysis.captions import kinds_of_fewer_runs, mean_and_std, spread_over
from analysis.cells import Cell, over_seeds
from analysis.drawn import Drawn, Options, Outcome, source_of
from analysis.load import Results
from analysis.searched import (
    KINDS,
    draw_each_search,
    heading_of,
    how_searched,
    removed_units,
    searched_examples,
    title_of,
)
from analysis.shares import fix_shares, plot_share_above, shares_above
from analysis.style import STROKES, house_style, new_figure, place_legend_below

_UNIT = ["layer_index", "unit"]
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_FIRST = 0.75  # left end of the logarithmic axis
_HASH = 2654435761  # odd, so that ids times it differ modulo 2**32; an order that neither class nor source follows


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield, one a cell and search, over how many examples each removed unit is critical."""
    missing = results.missing("removed_units", "of flipped examples")
    draw_part = partial(_draw, examples=searched_examples(results))
    return draw_each_search("shared_units", removed_units(results), results.cells, draw_part, missing=missing)


def of_equally_many(removed: pl.DataFrame) -> pl.DataFrame:
    """Return, for each run, the removals from equally many clean and noisy examples: as many as the rarer kind has."""
    order = (pl.col("example_id") * _HASH % 2**32).rank("ordinal").over("run_id", "kind")
    examples = removed.select("run_id", "kind", "example_id").unique().with_columns(place=order)
    n = pl.col("place").max().over("run_id", "kind").min().over("run_id")
    drawn = examples.filter(pl.col("place") <= n)
    return removed.join(drawn, on=["run_id", "kind", "example_id"], how="semi", maintain_order="left")


def measure_overlap(removed: pl.DataFrame) -> pl.DataFrame:
    """Return, a row a run and kind, how far its examples share the units removed for them.

    n_examples, n_units: how many there are, units counted once.
    alone: share of these units that are critical for exactly one example.
    removals: mean number of units of an example.
    overlap: mean number of units that two examples have in common.
    by_chance: the same, if each example's units were drawn at random from all units of the layers removed from.
    """
    key = ["run_id", "kind"]
    # Not the 32 bits of a length: products of counts are added up.
    times, lengths = (removed.group_by(*key, *part).agg(n=pl.len().cast(pl.Int64)) for part in (_UNIT, ["example_id"]))
    n_all = removed.unique("layer_index")["n_units"].sum()
    n_pairs = pl.col("n_examples") * (pl.col("n_examples") - 1)
    units = times.group_by(key).agg(
        n_units=pl.len(), alone=(pl.col("n") == 1).mean(), common=(pl.col("n") * (pl.col("n") - 1)).sum()
    )
    examples = lengths.group_by(key).agg(
        n_examples=pl.len(), removals=pl.col("n").mean(), products=pl.col("n").sum().pow(2) - pl.col("n").pow(2).sum()
    )
    return units.join(examples, on=key).with_columns(
        overlap=pl.col("common") / n_pairs, by_chance=pl.col("products") / n_pairs / n_all
    )


def _draw(name: str, cell: Cell, rows: pl.DataFrame, *, search: str, examples: pl.DataFrame) -> Outcome:
    chosen = of_equally_many(rows)
    searched, found = cell.rows(examples).filter(search=search), measure_overlap(chosen)
    # The removals come without their units, which in millions of rows take long.
    units = source_of("critical_units", searched.filter("flipped")).units
    source = replace(source_of("removed_units", chosen), units=units)
    counted = found.group_by("run_id", maintain_order=True).agg(pl.col("n_examples").first())["n_examples"].sort()
    caption = (
        f"For {cell.title}: share of the removed units that are critical (were removed on the way to a flip) for more "
        "than that many examples, among equally many flipped clean and noisy examples of each run, "
        f"{', '.join(map(str, counted.unique().sort()))} of each kind, drawn in the order of a hash of their ids. "
        f"{how_searched(searched)} {spread_over(source.seeds)}"
        f"{kinds_of_fewer_runs(chosen, source.n_runs)} "
        f"{' '.join(_spell(found.filter(kind=kind), kind) for kind in KINDS if kind in found['kind'])}"
        f"{_spell_both(chosen)}"
    )
    heading = heading_of("Over how many examples a unit is critical", search)
    return Drawn(_plot(title_of(cell.title, search), chosen), name, f"{heading}: {cell.title}", caption, source)


def _spell(found: pl.DataFrame, kind: str) -> str:
    """Return one kind's numbers, a mean over runs each."""
    alone, removals, overlap, chance = (_over_runs(found, v) for v in ("alone", "removals", "overlap", "by_chance"))
    units = " and ".join(map(str, found["n_units"].sort()))
    return (
        f"Of the {units} units removed for {kind} examples, a share of {alone} is critical for exactly one; two "
        f"{kind} examples have {overlap} units in common of {removals} each ({chance} if drawn at random from the "
        "layers that anything was removed from)."
    )


def _over_runs(found: pl.DataFrame, value: str) -> str:
    mean = over_seeds(found, by=["kind"], value=value)
    return mean_and_std(mean["mean"][0], mean["std"][0]) if mean.height else "undefined"


def _spell_both(removed: pl.DataFrame) -> str:
    """Return which share of the noisy examples' units is critical for clean ones too."""
    clean, noisy = (removed.filter(kind=kind).select("run_id", *_UNIT).unique() for kind in KINDS)
    if clean.is_empty() or noisy.is_empty():
        return ""
    both = noisy.join(clean, on=["run_id", *_UNIT], how="semi")
    return f" Of the noisy examples' units, a share of {both.height / noisy.height:.3f} is a clean one's too."


def _plot(title: str, removed: pl.DataFrame) -> Figure:
    times = removed.group_by("run_id", "kind", *_UNIT).agg(n=pl.len())
    curves, most = shares_above(times, "n"), int(times["n"].to_numpy().max())
    with house_style():
        figure = new_figure(title, height=2.6)
        axes = figure.subplots()
        for kind in KINDS:
            curve = curves.filter(kind=kind)
            if not curve.is_empty():
                plot_share_above(axes, curve, STROKES[kind], ends=(_FIRST, 1.3 * most), label=kind)
        ticks = [tick for tick in _TICKS if tick <= most]
        axes.set_xscale("log")
        axes.set_xlim(_FIRST, 1.3 * most)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        fix_shares(axes)
        axes.set_xlabel("examples a unit is critical for")
        axes.set_ylabel("share of units above")
        place_legend_below(figure, axes)
    return figure
