"""What one figure shows: finished runs that differ in the seed alone, of one model or of several side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from analysis.settings import is_main_label
from memlib.config import short_hash

GROUP = ("group_index", "group")  # what names a layer group, sorted by depth
_KEY = ("dataset", "model", "setting")
_LONGEST_STEM = 120  # characters; file systems stop at 255 bytes


@dataclass(frozen=True)
class Cell:
    """All finished runs of one dataset, model and setting.

    setting: what sets it apart from the other cells of its dataset and model, and in images, augmentation and noise
    from those of other models; "" if nothing does.
    stem: names the cell in file names; unique among the cells, on case-insensitive disks too.
    """

    dataset: str
    model: str
    setting: str
    stem: str

    @property
    def title(self) -> str:
        """Return dataset, model and setting in words."""
        return ", ".join(part for part in (self.dataset, self.model, self.setting) if part)

    @property
    def is_main(self) -> bool:
        """Return whether its runs have no dropout and are no controls of runs that have."""
        return is_main_label(self.setting)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Return the cell alone, as a comparison returns its cells."""
        return (self,)

    def rows(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the cell's rows of a frame that carries dataset, model and setting."""
        return frame.filter(dataset=self.dataset, model=self.model, setting=self.setting)


@dataclass(frozen=True)
class Comparison:
    """The cells of one dataset and setting, one a model: what a figure across models shows side by side.

    stem: names the comparison in file names; unique among the comparisons, on case-insensitive disks too.
    """

    dataset: str
    setting: str
    stem: str
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """Return dataset and setting in words, and the model where there is only one."""
        return self.cells[0].title if len(self.cells) == 1 else ", ".join(filter(None, (self.dataset, self.setting)))

    @property
    def models(self) -> tuple[str, ...]:
        """Return the models, in the order of their columns."""
        return tuple(cell.model for cell in self.cells)

    def rows(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the rows of all its cells."""
        return frame.filter(dataset=self.dataset, setting=self.setting)


def find_cells(runs: pl.DataFrame) -> tuple[Cell, ...]:
    """Return the cells the runs fall into, sorted by dataset, model and setting."""
    keys = runs.select(_KEY).unique().sort(_KEY).rows()
    stems = unique_stems([[part for part in key if part] for key in keys])
    return tuple(Cell(*key, stem=stem) for key, stem in zip(keys, stems, strict=True))


def find_comparisons(cells: Sequence[Cell]) -> tuple[Comparison, ...]:
    """Return the comparisons the cells form, sorted by dataset and setting; every cell is in one."""
    keys = sorted({(cell.dataset, cell.setting) for cell in cells})
    members = [tuple(cell for cell in cells if (cell.dataset, cell.setting) == key) for key in keys]
    stems = unique_stems([[part for part in key if part] for key in keys])
    return tuple(Comparison(*key, stem, chosen) for key, stem, chosen in zip(keys, stems, members, strict=True))


def over_seeds(rows: pl.DataFrame, *, by: Sequence[str], value: str) -> pl.DataFrame:
    """Return columns `by`, mean, std (sample standard deviation, null for one run) and n_runs, sorted by `by`.

    rows: one a run and `by`; missing and non-finite values are left out, and not counted.
    """
    finite = rows.filter(pl.col(value).is_finite())
    grouped = finite.group_by(by, maintain_order=True)
    return grouped.agg(mean=pl.col(value).mean(), std=pl.col(value).std(), n_runs=pl.len()).sort(by)


def unique_stems(keys: Sequence[Sequence[str]]) -> list[str]:
    """Return names for files, one a key (some texts), that are unique on case-insensitive disks too."""
    stems = ["-".join(_safe(part) for part in key) for key in keys]
    count = Counter(stem.casefold() for stem in stems)
    return [
        f"{stem[:_LONGEST_STEM]}-{short_hash(key)}" if count[stem.casefold()] > 1 or len(stem) > _LONGEST_STEM else stem
        for stem, key in zip(stems, keys, strict=True)
    ]


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+_-]+", "_", text.replace(", ", "-")).strip("_") or "_"
