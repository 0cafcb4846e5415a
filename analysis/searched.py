"""The rows of tables `critical_units` and `removed_units` that figures show, apart by how units were searched for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import polars as pl

from analysis.captions import count
from analysis.cells import Cell
from analysis.drawn import Outcome, Skipped, draw_each
from analysis.load import Results

KINDS = ("clean", "noisy")

# The paper's search; figures of any other carry what differs, such as refresh=4.
MAIN_SEARCH: Mapping[str, str | int | float] = {
    "removal": "filter",
    "reference_size": 512,
    "copies": 5,
    "reference_copies": 5,
    "refresh": 1,
    "noise": 0.01,
    "max_steps": 100,
    "precision": "float32",
}
_RUN = ("run_id", "dataset", "model", "seed", "setting")
_EXAMPLE = (*_RUN, "unit_id", "example_id", "is_noisy", "right_early", "early_epoch", "outcome", "flipped", "n_removed")
_EXAMPLE += ("n_clean", "n_noisy")
_REMOVAL = (*_RUN, "example_id", "layer", "layer_index", "n_units", "unit")
_FEW_VALUES = ("run_id", "dataset", "model", "setting", "layer")  # in very many rows
_REMOVALS = {"filter": "at its filter", "activation": "at its activation"}


def searched_examples(results: Results) -> pl.DataFrame:
    """Return a row an example, run and search: the one judged on most examples, if it was searched several times.

    Of those, one that knows whether the example was learned early.

    With columns
    search: how the settings differ from the paper's, "" if they do not.
    kind: clean or noisy.
    needed: number of units removed until the flip, infinite for an example that did not flip.
    drop: training accuracy before minus after, over clean and noisy examples together.
    data_seed: by which the run's examples were drawn.
    """
    return results.once(_collect_searched)


def _collect_searched(results: Results) -> pl.DataFrame:
    draws = results.runs.select("run_id", "data_seed").lazy()
    return results.collect(_searched(results.scan("critical_units")).join(draws, on="run_id", maintain_order="left"))


def _searched(rows: pl.LazyFrame) -> pl.LazyFrame:
    accuracies = {when: _training_accuracy(when) for when in ("before", "after")}
    found = rows.select(
        *_EXAMPLE,
        *MAIN_SEARCH,
        search=_differing_settings(),
        kind=_kind(),
        needed=pl.when("flipped").then(pl.col("n_removed").cast(pl.Float64)).otherwise(math.inf),
        drop=accuracies["before"] - accuracies["after"],
    )
    order = pl.col("n_clean") + pl.col("n_noisy"), pl.col("right_early").is_null(), "unit_id"
    found = found.sort(order, descending=[True, False, False], nulls_last=True, maintain_order=True)
    return found.unique(["run_id", "search", "example_id"], keep="first", maintain_order=True)


def removed_units(results: Results) -> pl.DataFrame:
    """Return a row a removal from the examples that `searched_examples` returns and that flipped.

    With their columns kind and search.
    """
    return results.once(_collect_removed)


def _collect_removed(results: Results) -> pl.DataFrame:
    flipped = searched_examples(results).lazy().filter("flipped").select("unit_id", "example_id", "search")
    rows = results.scan("removed_units").select("unit_id", *_REMOVAL, kind=_kind())
    rows = rows.join(flipped, on=["unit_id", "example_id"], maintain_order="left").drop("unit_id")
    return results.collect(rows.with_columns(pl.col(_FEW_VALUES).cast(pl.Categorical)))


def not_skipped(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the examples that were searched: those that the intact model predicts as assigned."""
    return rows.filter(pl.col("outcome") != "skipped")


def draw_each_search(
    name: str,
    rows: pl.DataFrame,
    cells: Sequence[Cell],
    draw_part: Callable[..., Outcome],
    *,
    missing: str | None,
) -> Iterator[Outcome]:
    """Yield what `draw_part` makes of each cell's rows of the paper's search, then of those of others.

    `draw_part` is given `search=` too; the figures of other searches are named e.g. figure5_refresh=4.
    missing: the reason a cell without any rows is skipped; with None it is passed over.
    """
    for search in rows["search"].unique().sort().to_list():
        chosen = rows.filter(search=search)
        own_name = f"{name}_{search}" if search else name
        yield from draw_each(own_name, chosen, cells, partial(draw_part, search=search), missing=None)
    if missing and rows.is_empty():
        yield Skipped(name, missing)
    elif missing:
        without = [cell for cell in cells if cell.is_main and cell.rows(rows).is_empty()]
        yield from (Skipped(f"{name}-{cell.stem}", missing) for cell in without)


def title_of(title: str, search: str) -> str:
    """Return a figure's title, with the search where it is not the paper's."""
    return f"{title}\nsearch: {_in_words(search)}" if search else title


def heading_of(heading: str, search: str) -> str:
    """Return a figure's heading in the index, likewise."""
    return f"{heading} (search: {_in_words(search)})" if search else heading


def how_searched(rows: pl.DataFrame) -> str:
    """Return the settings of a search, the same in all rows, and whether it was exact, in the words of a caption."""
    found = rows.select(*MAIN_SEARCH).row(0, named=True)
    copies, refresh = found["reference_copies"], found["refresh"]
    every = "every step" if refresh == 1 else f"every {refresh} steps"
    kind = "exact" if refresh == 1 and copies == found["copies"] else "fast, that is approximate"
    return (
        f"The search was {kind}: a unit is removed {_REMOVALS.get(found['removal'], found['removal'])}; the gradient "
        f"of the reference batch, of {count(found['reference_size'], 'example')}, is renewed {every} over "
        f"{'1 noisy copy' if copies == 1 else f'{copies} noisy copies'} of it, the example's own is over "
        f"{found['copies']}, with noise of {100 * found['noise']:g} % of the input's norm; at most "
        f"{count(found['max_steps'], 'unit')}; {found['precision']}."
    )


def _in_words(search: str) -> str:
    return search.replace("+", ", ")


def _kind() -> pl.Expr:
    return pl.when("is_noisy").then(pl.lit("noisy")).otherwise(pl.lit("clean"))


def _differing_settings() -> pl.Expr:
    """Return e.g. "copies=1+refresh=4"; "+" as file names have it."""
    parts = [
        pl.when(pl.col(name) != value).then(pl.format(f"{name}={{}}", pl.col(name)))
        for name, value in MAIN_SEARCH.items()
    ]
    return pl.concat_str(parts, separator="+", ignore_nulls=True)


def _training_accuracy(when: str) -> pl.Expr:
    """Return the mean accuracy over all judged examples, clean and noisy, `before` or `after` the removals."""
    right = pl.sum_horizontal(pl.col(f"{kind}_accuracy_{when}") * pl.col(f"n_{kind}") for kind in KINDS)
    return right / pl.sum_horizontal(pl.col(f"n_{kind}") for kind in KINDS)
