"""What a figure function takes and hands back: options in; drawn figures, and what was skipped and why, out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import polars as pl
from matplotlib.figure import Figure

from analysis.cells import Cell, Comparison
from analysis.tables import Table
from memlib.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may change about the figures.

    gradient_epochs: first and last epoch that Figure 1 averages over, both included.
    """

    gradient_epochs: tuple[int, int] = (15, 20)

    def __post_init__(self) -> None:
        first, last = self.gradient_epochs
        if not 1 <= first <= last:
            raise InputError(
                f"--gradient-epochs is {first} {last}; give the first and the last epoch, from 1 upwards, e.g. 15 20."
            )


@dataclass(frozen=True)
class Source:
    """The rows behind a figure, of these runs.

    beside: further runs that they are compared with.
    units: the units of experiments that wrote the rows; none where the runs themselves did.
    """

    table: str
    n_rows: int
    run_ids: tuple[str, ...]
    seeds: tuple[int, ...]
    beside: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    @property
    def n_runs(self) -> int:
        """Return the number of runs the rows are of."""
        return len(self.run_ids)


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, and what a reader needs beside it; `name` is its file name without ending, and its tables'."""

    figure: Figure
    name: str
    title: str
    caption: str
    source: Source
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A figure that was not drawn; the reason says what to run or to change."""

    name: str
    reason: str


_OF_SOURCE = {"run_id": pl.String, "seed": pl.Int64}  # run ids of very many rows are categories
Outcome = Drawn | Skipped
Part = TypeVar("Part", bound=Cell | Comparison)


def source_of(table: str, rows: pl.DataFrame) -> Source:
    """Return which rows of `table` a figure shows, and of which units of work where they have a `unit_id`."""
    run_ids, seeds = (tuple(rows[name].unique().cast(dtype).sort()) for name, dtype in _OF_SOURCE.items())
    units = tuple(rows["unit_id"].unique().sort()) if "unit_id" in rows.columns else ()
    return Source(table, rows.height, run_ids, seeds, units=units)


def draw_each(
    name: str,
    rows: pl.DataFrame,
    parts: Sequence[Part],
    draw_part: Callable[[str, Part, pl.DataFrame], Outcome],
    *,
    missing: str | None,
) -> Iterator[Outcome]:
    """Yield what `draw_part` makes of the rows of each part (a cell or a comparison), given that figure's name.

    missing: the reason a main cell, or all cells, without rows are skipped; with None they are passed over.
    """
    if rows.is_empty() and missing:
        yield Skipped(name, missing)
    if rows.is_empty():
        return
    for part in parts:
        chosen = part.rows(rows)
        if not chosen.is_empty():
            yield draw_part(f"{name}-{part.stem}", part, chosen)
        for cell in part.cells:
            if missing and cell.is_main and cell.rows(chosen).is_empty():
                yield Skipped(f"{name}-{cell.stem}", missing)
