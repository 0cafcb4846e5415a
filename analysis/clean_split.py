"""Figure 5 a once more, clean examples split: those that had to be memorized as well against the others.

Paper: no figure of it. Where test accuracy is low, many clean examples are memorized too; an early epoch, before
noise was memorized, tells which: it predicts the others as assigned already.
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl
from matplotlib.figure import Figure

from analysis.captions import kinds_of_fewer_runs, spread_over
from analysis.cells import Cell
from analysis.drawn import Drawn, Options, Outcome, Skipped, source_of
from analysis.flips import FLIPS, none_flipped, plot_flips, spell_flips
from analysis.load import Results
from analysis.rank_test import spell_test
from analysis.searched import draw_each_search, heading_of, how_searched, not_skipped, searched_examples, title_of
from analysis.style import STROKES, Stroke, house_style, new_figure

_RIGHT, _WRONG = "clean (right early)", "clean (wrong early)"
_STROKES = {_RIGHT: STROKES["clean"], _WRONG: Stroke("#56B4E9", "-.", "^"), "noisy": STROKES["noisy"]}


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield, one a cell and search, the units removed until the flip with clean examples split in two."""
    yield from draw_each_search("figure5_clean_split", searched_examples(results), results.cells, _draw, missing=None)


def _draw(name: str, cell: Cell, rows: pl.DataFrame, *, search: str) -> Outcome:
    split = rows.filter(~pl.col("is_noisy"), pl.col("right_early").is_not_null())
    if split.is_empty():
        return Skipped(
            name,
            "right_early is unknown, for no state is kept from before noise was memorized; train again with an early "
            "epoch among --set checkpoints.epochs",
        )
    known = rows.filter(pl.col("is_noisy") | pl.col("right_early").is_not_null()).with_columns(kind=_split_kind())
    known = known.join(split.select("run_id").unique(), on="run_id", how="semi")
    if known.filter("flipped").is_empty():
        return Skipped(name, none_flipped(known))
    epochs = split["early_epoch"].unique().drop_nulls().sort().to_list()
    source, kinds = source_of("critical_units", known), [kind for kind in _STROKES if kind in known["kind"]]
    tests = [(_RIGHT, "noisy"), (_WRONG, "noisy"), (_RIGHT, _WRONG)]
    found = [spell_test(not_skipped(known), pair, "needed") for pair in tests]
    caption = (
        f"For {cell.title}: {FLIPS}. Clean examples are split by whether the model after epoch "
        f"{' or '.join(map(str, epochs))} predicted them as assigned, as it did {_share_of_noisy(known)}. "
        f"{how_searched(rows)} {spread_over(source.seeds)}"
        f"{kinds_of_fewer_runs(not_skipped(known), source.n_runs)} Units until the flip, the mean over the flipped: "
        f"{'; '.join([*(spell_flips(known, kind) for kind in kinds), *filter(None, found)])}."
    )
    heading = heading_of("Figure 5 a, clean examples split", search)
    return Drawn(_plot(title_of(cell.title, search), known), name, f"{heading}: {cell.title}", caption, source)


def _share_of_noisy(rows: pl.DataFrame) -> str:
    """Spell how much of the noise was memorized at the early epoch; if much, the split is none by memorization."""
    right = rows.filter("is_noisy").select(pl.col("right_early").mean()).item()  # of those that are known
    return "no noisy one that is known" if right is None else f"{100 * right:.0f} % of the noisy ones"


def _split_kind() -> pl.Expr:
    split = pl.when("right_early").then(pl.lit(_RIGHT)).otherwise(pl.lit(_WRONG))
    return pl.when("is_noisy").then(pl.lit("noisy")).otherwise(split)


def _plot(title: str, rows: pl.DataFrame) -> Figure:
    with house_style():
        figure = new_figure(title, height=2.6)
        axes = figure.subplots()
        plot_flips(axes, rows, _STROKES)
        axes.legend(loc="upper right")  # where falling curves leave room
    return figure
