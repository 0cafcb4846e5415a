"""What a figure function takes and hands back: options in; drawn figures, and what was skipped and why, out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import polars as pl
from matplotlib.figure import Figure

from analysis.cells import Cell
from analysis.load import Results
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
    """The rows behind a figure."""

    table: str
    n_rows: int
    n_runs: int
    seeds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, and what a reader needs beside it; `name` is its file name without ending."""

    figure: Figure
    name: str
    title: str
    caption: str
    source: Source


@dataclass(frozen=True)
class Skipped:
    """A figure that was not drawn; the reason says what to run or to change."""

    name: str
    reason: str


Outcome = Drawn | Skipped


def source_of(table: str, rows: pl.DataFrame) -> Source:
    """Return which rows of `table` a figure shows."""
    return Source(table, rows.height, rows["run_id"].n_unique(), tuple(rows["seed"].unique().sort()))


def draw_each_cell(
    name: str, table: str, results: Results, draw_cell: Callable[[str, Cell, pl.DataFrame], Outcome]
) -> Iterator[Outcome]:
    """Yield what `draw_cell` makes of each cell's rows of `table`, given that figure's name.

    A cell, or all of them, without rows is skipped with the command that makes them.
    """
    rows = results.table(table)
    reason = f"no rows in table {table}; run {results.command}"
    if rows.is_empty():
        yield Skipped(name, reason)
        return
    for cell in results.cells:
        chosen = cell.rows(rows)
        full_name = f"{name}-{cell.stem}"
        yield Skipped(full_name, reason) if chosen.is_empty() else draw_cell(full_name, cell, chosen)
