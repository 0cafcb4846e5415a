"""Draw every figure from the results: `python analysis/figures.py`.

Writes FIGURES/*.png and *.pdf, tables as *.md and *.tex, and FIGURES/index.md, and names the files. A figure without
rows is skipped with what to run. Exit status: 0 something was drawn, 1 nothing could be, 2 bad input.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path

from analysis import (
    clean_split,
    critical_units,
    criticality,
    dropout_schematic,
    dropout_search,
    forgotten_images,
    gradients,
    learning_curves,
    mislabels,
    retraining,
    rewinding,
    rewinding_sets,
    shared_units,
    table1,
)
from analysis.captions import count
from analysis.drawn import Options, Outcome, Skipped
from analysis.garbage import collecting_less_often, end_sooner
from analysis.index import Section, describe, read_sections, remove_stale, write_index
from analysis.load import Results, load_tables
from analysis.saving import save
from analysis.sharing import share_work
from analysis.tables import save_tables
from memlib.errors import InputError, unknown
from memlib.results import open_results

FigureFunction = Callable[[Results, Options], Iterator[Outcome]]

# A new figure is one function and one line here; names are lower case without "-". File names start with them:
# NAME-digits-resnet9, and NAME_VARIANT-digits-resnet9 where a figure has variants.
FIGURES: tuple[tuple[str, FigureFunction], ...] = (
    ("learning_curves", learning_curves.draw),
    ("figure1", gradients.draw_norms),
    ("figure2", gradients.draw_cosines),
    ("figure3", rewinding.draw),
    ("criticality", criticality.draw),
    ("rewinding_sets", rewinding_sets.draw),
    ("figure4", retraining.draw),
    ("figure4_control", retraining.draw_control),
    ("figure5", critical_units.draw),
    ("figure5_clean_split", clean_split.draw),
    ("shared_units", shared_units.draw),
    ("table1", table1.draw),
    ("figure6", dropout_schematic.draw),
    ("figure7", forgotten_images.draw),
    ("mislabels", mislabels.draw),
    ("dropout_search", dropout_search.draw),
)

# Groups of figures that read the same tables, and long ones alone; the group that takes longest first. Of several
# processes none reads what another has read, if it can be, and all end together.
_TOGETHER = (
    ("figure5", "shared_units", "figure5_clean_split"),
    ("figure4_control", "figure4"),
    ("mislabels",),
    ("figure3", "criticality", "rewinding_sets"),
    ("figure1", "figure2"),
    ("learning_curves",),
)
_MANY_RUNS = 8  # from here on others help; one takes two seconds to start
_MOST_OTHERS = 3


@dataclass(frozen=True)
class Finished:
    """What one entry of FIGURES left: its files, their parts of the index, and what it skipped."""

    paths: tuple[Path, ...]
    sections: tuple[Section, ...]
    skipped: tuple[Skipped, ...]


def draw_figures(
    results: Results,
    folder: Path,
    *,
    options: Options | None = None,
    only: Sequence[str] = (),
    processes: int = 1,
) -> tuple[list[Path], list[Skipped]]:
    """Return the files written to `folder` (the index last; none if nothing was drawn) and what was skipped.

    only: names of figures; the others of the folder, and their part of the index, stay as they are.
    Pictures that the folder's index names and that are no longer drawn are removed.
    processes: how many draw, with this one, where there are many runs; above 1 the caller's main module is imported
    in each of the others, and they open the results by their location.

    Raises:
        InputError: a name in `only` is unknown, or the folder cannot be used.
    """
    names = [name for name, _ in FIGURES]
    for name in only:
        if name not in names:
            raise unknown("figure", name, names)
    before = _open_folder(folder)
    results.failed_units  # noqa: B018 - the index names them: a damaged file is an error before anything is drawn
    kept = [section for section in before if only and _figure_of(section) not in only]
    options = options or Options()
    chosen = [name for name in names if not only or name in only]
    most = _MOST_OTHERS if results.runs.height >= _MANY_RUNS else 0
    finished = share_work(
        _in_groups(chosen),
        functools.partial(_finish, results=results, folder=folder, options=options),
        functools.partial(_finish_elsewhere, location=results.location, folder=folder, options=options),
        others=min(processes - 1, len(chosen) - 1, most),
    )
    in_order = [finished[name] for name in chosen]
    paths = [path for one in in_order for path in one.paths]
    sections = [section for one in in_order for section in one.sections]
    skipped = [skip for one in in_order for skip in one.skipped]
    listed = sorted([*kept, *sections], key=lambda section: (_place_of(section), section.name))
    remove_stale(folder, before, {section.name for section in listed})
    index = write_index(folder, listed, skipped, results)
    return ([*paths, index] if paths else []), skipped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = _parser().parse_args(arguments)
    try:
        options = Options(gradient_epochs=tuple(given.gradient_epochs))
        results = load_tables(open_results(given.results))
        n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        paths, skipped = draw_figures(results, Path(given.figures), options=options, only=given.only, processes=n)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}: removed while it was read, as by sweeps/compact.py; run this again\n")
        return 2
    except BrokenExecutor as error:
        why = "was ended from outside, most likely for want of memory" if error.__cause__ is None else error.__cause__
        sys.stderr.write(
            f"a process that helped to draw: {why}; draw fewer figures at once, e.g. --only learning_curves\n"
        )
        return 2
    except (InputError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for skip in skipped:
        sys.stderr.write(f"{skip.name} skipped: {skip.reason}\n")
    if not paths:
        n_done, n_failed = results.runs.height, results.failed.height
        sys.stderr.write(
            f"nothing to draw in {results.location}: {count(n_done, 'finished run')}, {n_failed} failed; "
            f"see {_relative(Path(given.figures) / 'index.md')}\n"
        )
        return 1
    if not results.failed_units.is_empty():
        n_failed, where = count(results.failed_units.height, "unit"), _relative(Path(given.figures) / "index.md")
        sys.stderr.write(f"{n_failed} of experiments failed and are in no figure; see {where}\n")
    sys.stdout.write("".join(f"{_relative(path)}\n" for path in paths))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python analysis/figures.py", description="Draw every figure from results.")
    parser.add_argument("--results", default="results", help="folder or URI of the results (default: results)")
    parser.add_argument("--figures", default="figures", help="folder to draw into (default: figures)")
    parser.add_argument(
        "--gradient-epochs",
        nargs=2,
        type=int,
        default=(15, 20),
        metavar=("FIRST", "LAST"),
        help="epochs that Figure 1 averages over (default: 15 20)",
    )
    names = ", ".join(name for name, _ in FIGURES)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help=f"draw only these: {names}")
    return parser


def _in_groups(names: Sequence[str]) -> list[list[str]]:
    grouped = [[name for name in group if name in names] for group in _TOGETHER]
    return [*filter(None, grouped), *([name] for name in names if not any(name in group for group in grouped))]


def _finish(name: str, *, results: Results, folder: Path, options: Options) -> Finished:
    """Draw and save what an entry of FIGURES makes of the results."""
    paths, sections, skipped = [], [], []
    with collecting_less_often():
        for outcome in dict(FIGURES)[name](results, options):
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
                continue
            paths += save(outcome.figure, folder, outcome.name)
            paths += save_tables(outcome.tables, folder, outcome.name)
            sections.append(describe(outcome, results))
    return Finished(tuple(paths), tuple(sections), tuple(skipped))


def _finish_elsewhere(name: str, *, location: str, folder: Path, options: Options) -> Finished:
    return _finish(name, results=_results_at(location), folder=folder, options=options)


@functools.cache  # another process draws several figures, which share what is read
def _results_at(location: str) -> Results:
    return load_tables(open_results(location))


def _open_folder(folder: Path) -> list[Section]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write figures to {folder} ({error.strerror}); give another folder with --figures."
        ) from error
    return read_sections(folder)


def _figure_of(section: Section) -> str:
    """Return the name in FIGURES, the longest that fits: figure3_recalibrated-digits is a figure3."""
    head = section.name.split("-")[0]
    fitting = [name for name, _ in FIGURES if f"{head}_".startswith(f"{name}_")]
    return max(fitting, key=len, default="")


def _place_of(section: Section) -> int:
    names = [name for name, _ in FIGURES]
    return names.index(_figure_of(section)) if _figure_of(section) in names else len(names)


def _relative(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    end_sooner()
    sys.exit(main())
