"""The result tables as polars frames, joined to the runs they belong to."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from functools import cached_property

import polars as pl

from analysis.cells import Cell, Comparison, find_cells, find_comparisons
from analysis.scans import scan_table
from analysis.settings import label_settings
from memlib.config import config_from_json
from memlib.experiments import ExperimentsConfig
from memlib.results import ResultStore

_COMMAND = "python sweeps/full_paper.py"
_DEFAULT_RESULTS = "results"
_EXPERIMENTS = (*(field.name for field in fields(ExperimentsConfig)), "dropout_search")  # each has a table of its name
# In these a run has rows of several units of work, made by whatever code and device there was then.
_SEVERAL_UNITS = ("rewinding", "retraining", "critical_units", "removed_units")

_OF_UNITS = ("unit_id", "settings", "code_version", "device")


@dataclass(frozen=True, eq=False)
class Results:
    """The tables of one store, read when they are first asked for: whole (`table`), or what is needed (`scan`).

    runs: finished runs, with `setting`: what sets a run apart from others of its dataset and model; and `data_seed`, by
    which its examples were drawn.
    failed: the runs that failed, likewise, each with its error.
    Every other table holds the rows of finished runs, with their dataset, model, seed and setting; `unit_id` is
    kept only where a run has rows of several units.
    """

    store: ResultStore
    runs: pl.DataFrame
    failed: pl.DataFrame
    _scans: dict[str, pl.LazyFrame] = field(default_factory=dict, repr=False)
    _tables: dict[str, pl.DataFrame] = field(default_factory=dict, repr=False)
    _units: dict[str, pl.DataFrame] = field(default_factory=dict, repr=False)
    _listed: dict[str, set[str]] = field(default_factory=dict, repr=False)
    _computed: dict[Callable[[Results], pl.DataFrame], pl.DataFrame] = field(default_factory=dict, repr=False)

    @cached_property
    def failed_units(self) -> pl.DataFrame:
        """The units of experiments on finished runs that failed, each with its error.

        Which they are is told by listing: only the rows of units without a file of their experiment are read.
        """
        done = set[str]().union(*map(self._done, _EXPERIMENTS))
        not_done = sorted(self.store.units("units") - done)
        rows = [row for unit in not_done for row in self.store.rows_of("units", unit)]
        merged = set(not_done) - {row["unit_id"] for row in rows}
        if merged:
            wanted = self._rows("units").filter(pl.col("unit_id").is_in(sorted(merged)))
            rows += self.collect(wanted).to_dicts()
        found = pl.DataFrame(rows, schema=self._rows("units").collect_schema())
        facts = self.runs.select("run_id", "dataset", "model", "seed", "setting")
        return found.filter(status="failed").join(facts, on="run_id")

    def units(self, ids: Collection[str]) -> pl.DataFrame:
        """Return these units of experiments: unit_id, settings (JSON), code_version and device.

        Read, once, are those of the experiments that any of them is of: each has a file of its own until `compact`.
        """
        parts = []
        for experiment in _EXPERIMENTS:
            done = self._done(experiment)
            if done.isdisjoint(ids):
                continue
            if experiment not in self._units:
                rows = scan_table(self.store, "units", units=done)
                self._units[experiment] = self.collect(rows.select(_OF_UNITS))
            parts.append(self._units[experiment].filter(pl.col("unit_id").is_in(list(ids))))
        return pl.concat(parts) if parts else pl.DataFrame(schema=dict.fromkeys(_OF_UNITS, pl.String))

    def _done(self, experiment: str) -> set[str]:
        if experiment not in self._listed:
            self._listed[experiment] = self.store.units(experiment)
        return self._listed[experiment]

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
        which = f" {kind}" if kind and not self.collect(self.scan(table).head(1)).is_empty() else ""
        return f"no rows{which} in table {table}; run {self.command}"

    def scan(self, name: str, part: Cell | Comparison | None = None) -> pl.LazyFrame:
        """Return the finished runs' rows of a result table, lazily, with their dataset, model, seed and setting.

        part: only the rows of this part's runs; of a file that holds no row of them only the footer is read.

        Raises:
            InputError: a file is damaged or of another schema version.
        """
        facts = self.runs.select("run_id", "dataset", "model", "seed", "setting")
        rows = self._rows(name)
        if part is not None:
            facts = part.rows(facts)
            rows = rows.filter(pl.col("run_id").is_in(facts["run_id"].to_list()))
        return rows.join(facts.lazy(), on="run_id", maintain_order="left")

    def collect(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """Return the rows of a scan, or of what was made of one.

        Raises:
            InputError: a file is damaged; the message names it.
        """
        try:
            return rows.collect()
        except pl.exceptions.PolarsError:
            for name in self._scans:
                self.store.read(name)  # names the file, more slowly
            raise

    def once(self, compute: Callable[[Results], pl.DataFrame]) -> pl.DataFrame:
        """Return `compute(self)`, computed when it is first asked for: several figures show the same rows."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        return self._computed[compute]

    @cached_property
    def trials(self) -> pl.DataFrame:
        """The trials of searches over dropout settings, which are no runs."""
        return self.collect(self._rows("dropout_search"))

    def _rows(self, name: str) -> pl.LazyFrame:
        if name not in self._scans:
            self._scans[name] = scan_table(self.store, name)
        return self._scans[name]

    def table(self, name: str) -> pl.DataFrame:
        """Return all of the finished runs' rows of a result table, with their dataset, model, seed and setting.

        For small tables; of large ones figures scan what they need.
        """
        if name not in self._tables:
            dropped = () if name in _SEVERAL_UNITS else ("unit_id",)
            self._tables[name] = self.collect(self.scan(name).drop(dropped))
        return self._tables[name]


def load_tables(store: ResultStore) -> Results:
    """Return the results in a store; only the table `runs` is read now."""
    runs = scan_table(store, "runs").drop("unit_id").sort("dataset", "model", "seed", "run_id").collect()
    done = runs["status"] == "done"
    return Results(store, _with_setting(runs.filter(done)), _with_setting(runs).filter(~done))


def _with_setting(runs: pl.DataFrame) -> pl.DataFrame:
    labels = label_settings(runs.select("dataset", "model", "config").iter_rows())
    seeds = [config_from_json(config).data_seed for config in runs["config"]]
    return runs.with_columns(setting=pl.Series(labels, dtype=pl.String), data_seed=pl.Series(seeds, dtype=pl.Int64))
