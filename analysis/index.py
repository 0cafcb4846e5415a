"""`index.md`: each figure with its picture, caption and data, so that a folder of figures explains itself."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from analysis.captions import count
from analysis.drawn import Drawn, Skipped
from analysis.load import Results
from analysis.tables import to_markdown
from memlib.errors import InputError

INDEX = "index.md"
_MARK = "<!-- Written by analysis/figures.py; the next call writes it anew. -->"
_ENDINGS = ("png", "pdf", "md", "tex")
_RUN = ("dataset", "model", "setting", "seed")
# In words, and the column of table `runs`, and of table `units`.
_UNLIKE_RUNS = {"precision": "precision", "code": "code_version"}
_UNLIKE_UNITS = {"code": "code_version", "device": "device"}
_PICTURE = re.compile(r"^!\[[^]]*\]\(([A-Za-z0-9.=+_-]+)\.png\)$", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """One figure's part of the index; `name` is the figure's file name without ending."""

    name: str
    text: str


def describe(drawn: Drawn, results: Results) -> Section:
    """Return the index section of a figure drawn from the results."""
    source, name = drawn.source, drawn.name
    seeds = ", ".join(str(seed) for seed in source.seeds)
    tables = "".join(f"{to_markdown(table, with_caption=False)}\n" for table in drawn.tables)
    files = f"[PDF]({name}.pdf)" + (f" [tables]({name}.md) [LaTeX]({name}.tex)" if tables else "")
    text = (
        f"## {drawn.title}\n\n![{name}]({name}.png)\n\n{drawn.caption}\n\n{tables}"
        f"Data: {count(source.n_rows, 'row')} of table `{source.table}` from {count(source.n_runs, 'run')}; "
        f"{count(len(source.seeds), 'seed')} ({seeds}). {_tell_unlike(drawn, results)}"
        f"{_tell_shared(drawn, results.runs)}{files}\n"
    )
    return Section(name, text)


def _tell_unlike(drawn: Drawn, results: Results) -> str:
    """Say in what a figure's runs and units differ that is no setting of theirs, and moves numbers all the same."""
    source = drawn.source
    runs = results.runs.filter(pl.col("run_id").is_in([*source.run_ids, *source.beside]))
    told = _spell_unlike("runs", runs, _UNLIKE_RUNS)
    if source.units:  # else table `units` need not be read
        told += _spell_unlike("units of work", results.units(source.units), _UNLIKE_UNITS)
    return told


def _spell_unlike(who: str, rows: pl.DataFrame, columns: Mapping[str, str]) -> str:
    values = {name: rows[column].drop_nulls().unique().sort().to_list() for name, column in columns.items()}
    unlike = [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]
    return f"The {who} differ in {' and '.join(unlike)}. " if unlike else ""


def _tell_shared(drawn: Drawn, runs: pl.DataFrame) -> str:
    """Say that runs of several seeds were given the same examples: what their spread then leaves out."""
    chosen = runs.filter(pl.col("run_id").is_in(drawn.source.run_ids))
    if chosen["data_seed"].n_unique() == chosen["seed"].n_unique():
        return ""
    return "Runs of several seeds share examples and wrong labels (data.seed): their spread is that of training alone. "


def read_sections(folder: Path) -> list[Section]:
    """Return the figures' sections of the index in a folder, none if there is no index.

    Raises:
        InputError: there is an index that was not written here; it is not to be overwritten.
    """
    path = folder / INDEX
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if _MARK not in text:
        raise InputError(f"{path} was not written by analysis/figures.py; give another folder with --figures.")
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return [Section(found[1], part.rstrip() + "\n") for part in parts if (found := _PICTURE.search(part))]


def remove_stale(folder: Path, before: Sequence[Section], now: Collection[str]) -> None:
    """Remove the files that the previous index named and the new one does not; no other file is touched."""
    for section in before:
        files = [f"{section.name}.{ending}" for ending in _ENDINGS]
        for file in files if section.name not in now else []:
            if f"]({file})" in section.text:
                (folder / file).unlink(missing_ok=True)


def write_index(folder: Path, sections: Sequence[Section], skipped: Sequence[Skipped], results: Results) -> Path:
    """Write the index and return its path."""
    n_done = count(results.runs.height, "finished run")
    parts = [f"# Figures\n\n{_MARK}\n\n{count(len(sections), 'figure')} from {n_done} in `{results.location}`.\n"]
    parts += [section.text for section in sections]
    if skipped:
        parts.append("## Skipped\n\n" + "".join(f"- {s.name}: {s.reason}\n" for s in skipped))
    if not results.failed.is_empty():
        parts.append(
            f"## Failed runs\n\nNot in any figure; {results.command} tries them again.\n\n{_failures(results)}"
        )
    if not results.failed_units.is_empty():
        parts.append(
            "## Failed experiments\n\nFigures show the other units of the same runs, if any; "
            f"a sweep that wants these tries them again.\n\n{_failed_units(results)}"
        )
    path = folder / INDEX
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _failures(results: Results) -> str:
    rows = results.failed.select(*_RUN, "error").iter_rows()
    return "".join(f"- {_spell_run(*run)}: {_spell_error(error)}\n" for *run, error in rows)


def _failed_units(results: Results) -> str:
    """Return a line a run and experiment, with how many units failed and the first one's error."""
    by = [*_RUN, "experiment"]
    found = results.failed_units.group_by(by).agg(pl.len(), pl.col("error").first()).sort(by)
    return "".join(
        f"- {_spell_run(*run)}: {count(n, 'unit')} of {experiment}: {_spell_error(error)}\n"
        for *run, experiment, n, error in found.iter_rows()
    )


def _spell_run(dataset: str, model: str, setting: str, seed: int) -> str:
    return f"{', '.join(part for part in (dataset, model, setting) if part)}, seed {seed}"


def _spell_error(error: str | None) -> str:
    return " ".join((error or "no error recorded").split())
