"""Runs with example-tied dropout beside their controls: which belong together, and how accurate they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from analysis.cells import Cell, unique_stems
from analysis.load import Results
from analysis.settings import without_dropout
from memlib.config import RunConfig, config_from_json

TIED = "example_tied"
CONTROLS: Mapping[str, str] = {
    "none": "no dropout",
    "standard": "standard dropout",
    "channel": "channel dropout",
    "sparse": "fixed sparse network",
}
MISSING = "no finished run with example-tied dropout; run"
_ACCURACIES = ("run_id", "seed", "mode", "batchnorm", "rescaled", "split", "accuracy", "n")


@dataclass(frozen=True)
class TiedCell(Cell):
    """Runs with example-tied dropout; named without saying so, as figures of them say it anyway."""

    @property
    def title(self) -> str:
        """Return dataset, model and what sets it apart from other example-tied dropout, in words."""
        return ", ".join(part for part in (self.dataset, self.model, _without_kind(self.setting)) if part)


def tied_cells(results: Results) -> list[TiedCell]:
    """Return the cells of runs with example-tied dropout."""
    cells = [cell for cell in results.cells if config_of(results, cell).dropout.kind == TIED]
    keys = [[part for part in (c.dataset, c.model, _without_kind(c.setting)) if part] for c in cells]
    stems = unique_stems(keys)
    return [TiedCell(c.dataset, c.model, c.setting, stem) for c, stem in zip(cells, stems, strict=True)]


def controls_of(results: Results, tied: Cell) -> dict[str, list[Cell]]:
    """Return the controls of runs with example-tied dropout by their names in words, in the order of `CONTROLS`.

    They differ in their dropout alone, and theirs leaves as much on; cells of one name in what they recorded.
    """
    config = config_of(results, tied)
    found: list[tuple[int, str, Cell]] = []
    for cell in results.cells:
        if (cell.dataset, cell.model) == (tied.dataset, tied.model):
            control = config_of(results, cell)
            if _is_control(control, config):
                found.append((list(CONTROLS).index(control.dropout.kind), _name(control), cell))
    by_name: dict[str, list[Cell]] = {}
    for _, name, cell in sorted(found, key=lambda entry: (*entry[:2], entry[2].setting)):
        by_name.setdefault(name, []).append(cell)
    return by_name


def accuracies_of(results: Results, cells: Sequence[Cell]) -> pl.DataFrame:
    """Return `final_accuracies` of several cells; of runs of one seed in several, those of the first."""
    rows = pl.concat([final_accuracies(results, cell) for cell in cells])
    return rows.filter(pl.col("run_id") == pl.col("run_id").first().over("seed"))


def final_accuracies(results: Results, cell: Cell) -> pl.DataFrame:
    """Return the rows of table `dropout` of a cell; of runs without dropout those of their last epoch, as `plain`."""
    if config_of(results, cell).dropout.kind != "none":
        return cell.rows(results.table("dropout")).select(_ACCURACIES)
    rows = cell.rows(results.epochs)
    last = rows.filter(pl.col("epoch") == pl.col("epoch").max().over("run_id"))
    return last.with_columns(mode=pl.lit("plain"), batchnorm=pl.lit("final"), rescaled=False).select(_ACCURACIES)


def config_of(results: Results, cell: Cell) -> RunConfig:
    """Return the settings of a cell's runs, with one of their seeds."""
    return config_from_json(cell.rows(results.runs)["config"][0])


def _is_control(control: RunConfig, tied: RunConfig) -> bool:
    dropout = control.dropout
    if dropout.kind not in CONTROLS or without_dropout(control) != without_dropout(tied):
        return False
    return dropout == replace(tied.dropout, kind=dropout.kind, p_drop=dropout.p_drop)


def _name(control: RunConfig) -> str:
    dropout = control.dropout
    name = CONTROLS[dropout.kind]
    return name if dropout.p_drop is None else f"{name}, p {dropout.p_drop:g}"


def _without_kind(setting: str) -> str:
    return setting.removeprefix(f"dropout.kind={TIED}").removeprefix(", ")
