"""The result tables as polars frames, joined to the runs they belong to."""

from __future__ import annotations

import shlex
import typing
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl

from analysis.cells import Cell, Comparison, find_cells, find_comparisons
from analysis.settings import label_settings
from memlib.results import ResultStore

_COMMAND = "python sweeps/full_paper.py"
_DEFAULT_RESULTS = "results"
# In these a run may have rows of several units of work on the same layer group or example.
_SEVERAL_UNITS = ("retraining", "critical_units", "removed_units")


@dataclass(frozen=True, eq=False)
class Results:
    """The tables of one store; a table is read when it is first asked for.

    runs: finished runs, with `setting`: what sets a run apart from others of its dataset and model.
    failed: the runs that failed, likewise, each with its error.
    Every other table holds the rows of finished runs, with their dataset, model, seed and setting; `unit_id` is
    kept only where a run may have rows of several units on the same subject.
    """

    store: ResultStore
    runs: pl.DataFrame
    failed: pl.DataFrame
    _tables: dict[str, pl.DataFrame] = field(default_factory=dict, repr=False)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The groups of finished runs that may be averaged."""
        return find_cells(self.runs)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The cells that figures across models show side by side."""
        return find_comparisons(self.cells)

    @property
    def epochs(self) -> pl.DataFrame:
        """Accuracy and loss per epoch and split."""
        return self.table("epochs")

    @property
    def gradients(self) -> pl.DataFrame:
        """Norms and cosine of the clean and the noisy gradient per epoch and layer group."""
        return self.table("gradients")

    @property
    def location(self) -> str:
        """The folder or URI as the user gave it."""
        return self.store.storage.location

    @property
    def command(self) -> str:
        """The command that fills this store."""
        if self.location == _DEFAULT_RESULTS:
            return _COMMAND
        return f"{_COMMAND} --results {shlex.quote(self.location)}"

    def missing(self, table: str, kind: str = "") -> str:
        """Return why there is no figure of a table without rows, or without rows of one kind, and what to run."""
        which = f" {kind}" if kind and not self.table(table).is_empty() else ""
        return f"no rows{which} in table {table}; run {self.command}"

    @cached_property
    def trials(self) -> pl.DataFrame:
        """The trials of searches over dropout settings, which are no runs."""
        return _read(self.store, "dropout_search")

    def table(self, name: str) -> pl.DataFrame:
        """Return the finished runs' rows of a result table, with their dataset, model, seed and setting."""
        if name not in self._tables:
            facts = self.runs.select("run_id", "dataset", "model", "seed", "setting")
            self._tables[name] = _read(self.store, name).join(facts, on="run_id")
        return self._tables[name]


def load_tables(store: ResultStore) -> Results:
    """Return the results in a store; only the table `runs` is read now."""
    runs = _read(store, "runs").sort("dataset", "model", "seed", "run_id")
    done = runs["status"] == "done"
    return Results(store, _with_setting(runs.filter(done)), _with_setting(runs).filter(~done))


def _with_setting(runs: pl.DataFrame) -> pl.DataFrame:
    labels = label_settings(runs.select("dataset", "model", "config").iter_rows())
    return runs.with_columns(setting=pl.Series(labels, dtype=pl.String))


def _read(store: ResultStore, table: str) -> pl.DataFrame:
    arrow = store.read(table)
    if table not in _SEVERAL_UNITS:
        arrow = arrow.drop_columns(["unit_id"])
    return typing.cast(pl.DataFrame, pl.from_arrow(arrow, rechunk=False))
