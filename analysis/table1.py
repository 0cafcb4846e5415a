"""Table 1: what dropping the memorization neurons takes from clean, noisy and test examples.

Paper: Table 1. Before: clean and noisy examples under their own masks, test examples with all neurons on and the
memorization neurons times p_mem; after: memorization neurons dropped.
Deviations: the spread over seeds is shown, and the controls are rows: they have nothing to drop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.captions import count, judged_on, of_fewer_runs, spread_over
from analysis.cells import over_seeds
from analysis.drawn import Drawn, Options, Outcome, draw_each, source_of
from analysis.dropouts import MISSING as NOT_RUN
from analysis.dropouts import TiedCell, accuracies_of, config_of, controls_of, tied_cells
from analysis.load import Results
from analysis.means import SPLITS
from analysis.style import STROKES, house_style, new_figure
from analysis.tables import MISSING, Column, Table
from memlib.config import RunConfig

Percent = tuple[float, float | None]  # mean and standard deviation over seeds

# Table 1 of the paper (arXiv 2307.09542): clean, noisy, test before dropping, then after; percent.
PAPER: Mapping[str, tuple[float, ...]] = {
    "cifar10": (99.9, 99.3, 79.3, 90.8, 3.1, 82.7),
    "mnist": (100.0, 100.0, 99.0, 99.2, 0.1, 99.3),
    "svhn": (99.9, 99.6, 89.5, 95.8, 1.4, 89.6),
}
_VARIANTS = (  # name in words, mode, batchnorm, rescaled
    ("all neurons on, memorization neurons times p_mem", "scaled", "final", False),
    ("dropped", "dropped", "final", False),
    ("dropped, BatchNorm recalibrated", "dropped", "recalibrated", False),
    ("dropped, the others rescaled as in the release", "dropped", "final", True),
)
_NUMBER = ["mode", "batchnorm", "rescaled", "split"]
_TIED_NAMES = ("example-tied, before", "example-tied, dropped")
_SHIFTS = {"clean": -0.14, "noisy": 0.14, "test": 0.0}  # of a line's height, so that equal values are both seen
_BAND = "#F0F0F0"


@dataclass(frozen=True)
class Line:
    """One network of the table, in percent by split; `before` and `after` its memorization neurons are dropped."""

    name: str
    before: Mapping[str, Percent]
    after: Mapping[str, Percent]


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield Table 1 as figure and as tables, one a dataset, model and setting of example-tied dropout."""
    rows = results.table("dropout").filter(pl.col("mode") != "plain")
    missing = f"{NOT_RUN} {results.command}"
    return draw_each("table1", rows, tied_cells(results), partial(_draw, results=results), missing=missing)


def _draw(name: str, cell: TiedCell, rows: pl.DataFrame, *, results: Results) -> Outcome:
    controls = controls_of(results, cell)
    plain = {control: accuracies_of(results, found) for control, found in controls.items()}
    tied = Line("example-tied dropout", _percents(_before(rows)), _percents(_variant(rows, "dropped")))
    lines = [*(Line(control, _percents(found), {}) for control, found in plain.items()), tied]
    beside = [run_id for found in plain.values() for run_id in found["run_id"].unique()]
    source = replace(source_of("dropout", rows), beside=tuple(beside))
    judged = judged_on(_variant(rows, "dropped"), SPLITS)
    points = over_seeds(rows, by=_NUMBER, value="accuracy")
    spread = f"{spread_over(source.seeds)}{of_fewer_runs(points, source.n_runs, by=_NUMBER)}"
    parts = [_explain(config_of(results, cell)), spread, _seeds_of(plain, source.seeds), judged]
    caption = " ".join(part for part in parts if part)
    heading = f"Table 1: {cell.title}"
    tables = (
        _table(cell, lines, f"Accuracy before and after dropping: {cell.title}", caption),
        _variants(rows, f"Ways to drop: {cell.title}"),
    )
    return Drawn(_plot(cell, lines), name, heading, f"{caption} {_name_effect(lines)}", source, tables)


def _before(rows: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([_variant(rows, "tied"), _variant(rows, "scaled").filter(split="test")])


def _variant(rows: pl.DataFrame, mode: str, batchnorm: str = "final", rescaled: bool = False) -> pl.DataFrame:
    return rows.filter(mode=mode, batchnorm=batchnorm, rescaled=rescaled)


def _percents(rows: pl.DataFrame) -> dict[str, Percent]:
    found = over_seeds(rows, by=["split"], value="accuracy")
    return {split: (100 * mean, None if std is None else 100 * std) for split, mean, std, _ in found.iter_rows()}


_PAPERS = " The paper's numbers are of ResNet-9 on all images, with 10 % wrong labels."


def _explain(config: RunConfig) -> str:
    dropout, training = config.dropout, config.training
    return (
        "Accuracy in %, against the assigned label. Before: clean and noisy training examples under their own masks, "
        "test examples with all neurons on (memorization neurons times p_mem); after: memorization neurons dropped. "
        f"p_gen {dropout.p_gen:g}, p_mem {dropout.p_mem:g}, {count(training.epochs, 'epoch')} of "
        f"{training.schedule.replace('_', '-')} to {training.peak_lr:g}, {100 * config.noise.fraction:g} % wrong "
        "labels; the other networks have the same places for dropout and the same schedule."
        f"{_PAPERS if config.data.name in PAPER else ''}"
    )


def _seeds_of(plain: Mapping[str, pl.DataFrame], seeds: Sequence[int]) -> str:
    """Return which controls have other seeds; nothing if none has."""
    found = {name: tuple(rows["seed"].unique().sort()) for name, rows in plain.items()}
    others = [f"{name} {count(len(own), 'seed')}" for name, own in found.items() if own != tuple(seeds)]
    return f"Other seeds: {', '.join(others)}." if others else ""


def _name_effect(lines: list[Line]) -> str:
    *controls, tied = lines
    noisy = f"noisy {_spell(tied.before.get('noisy'))} before and {_spell(tied.after.get('noisy'))} after; "
    test = [f"{_spell(tied.after.get('test'))} after"]
    test += [f"{_spell(line.before['test'])} with {line.name}" for line in controls if "test" in line.before]
    return f"Example-tied dropout: {noisy if 'noisy' in tied.before else ''}test {', '.join(test)}."


def _table(cell: TiedCell, lines: list[Line], title: str, caption: str) -> Table:
    columns = (Column("network"), *(Column(split, when) for when in ("before", "after") for split in SPLITS))
    rows = [(line.name, *_entries(line.before), *_entries(line.after)) for line in (lines[-1], *lines[:-1])]
    paper = PAPER.get(cell.dataset)
    if paper is not None:
        rows.insert(1, ("the paper's", *(f"{value:.1f}" for value in paper)))
    return Table(title, caption, columns, tuple(rows))


def _variants(rows: pl.DataFrame, title: str) -> Table:
    found = {
        name: _percents(_variant(rows, mode, batchnorm, rescaled)) for name, mode, batchnorm, rescaled in _VARIANTS
    }
    entries = tuple((name, *_entries(percents)) for name, percents in found.items() if percents)
    caption = "Accuracy in %, against the assigned label, after training."
    return Table(title, caption, (Column("network"), *map(Column, SPLITS)), entries)


def _entries(percents: Mapping[str, Percent]) -> list[str]:
    return [_spell(percents.get(split)) for split in SPLITS]


def _spell(percent: Percent | None) -> str:
    if percent is None:
        return MISSING
    mean, std = percent
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _plot(cell: TiedCell, lines: list[Line]) -> Figure:
    *controls, tied = lines
    shown = [
        *((line.name, line.before) for line in controls),
        *zip(_TIED_NAMES, (tied.before, tied.after), strict=True),
    ]
    last = len(shown) - 1
    with house_style():
        figure = new_figure(cell.title, height=1.15 + 0.21 * len(shown))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for axes, splits in ((left, SPLITS[:2]), (right, SPLITS[2:])):
            _plot_splits(axes, [percents for _, percents in shown], splits)
            _plot_paper(axes, PAPER.get(cell.dataset, ()), splits, last - 1)
            axes.axhspan(last - 0.5, last + 0.5, color=_BAND, zorder=0, linewidth=0)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        left.set_yticks(range(len(shown)), [name for name, _ in shown])
        left.set_ylim(last + 0.5, -0.5)
        left.set_xlim(-5, 107)
        left.set_xlabel("training examples (%)")
        right.set_xlabel("test (%)")
        right.margins(x=0.15)
        _place_legend(figure, with_paper=cell.dataset in PAPER)
    return figure


def _plot_splits(axes: Axes, shown: list[Mapping[str, Percent]], splits: Sequence[str]) -> None:
    for split in splits:
        stroke = STROKES[split]
        found = {y: percents[split] for y, percents in enumerate(shown) if split in percents}
        axes.errorbar(
            [mean for mean, _ in found.values()],
            [y + _SHIFTS[split] for y in found],
            xerr=[math.nan if std is None else std for _, std in found.values()],
            fmt=stroke.marker,
            color=stroke.colour,
            elinewidth=0.8,
            capsize=1.5,
        )


def _plot_paper(axes: Axes, paper: Sequence[float], splits: Sequence[str], before: int) -> None:
    """Draw the paper's values as open markers, in the lines `before` and the next."""
    for i, value in enumerate(paper):
        split, place = SPLITS[i % 3], before + i // 3
        if split in splits:
            stroke = STROKES[split]
            y = place + _SHIFTS[split]
            axes.plot(value, y, stroke.marker, color=stroke.colour, fillstyle="none", markersize=6)


def _place_legend(figure: Figure, *, with_paper: bool) -> None:
    handles = [_handle(STROKES[split].marker, STROKES[split].colour, split) for split in SPLITS]
    if with_paper:
        handles.append(_handle("o", "black", "the paper's", fillstyle="none"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, borderpad=0.2, handletextpad=0.2)


def _handle(marker: str, colour: str, label: str, fillstyle: Literal["full", "none"] = "full") -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=colour, fillstyle=fillstyle, label=label)
