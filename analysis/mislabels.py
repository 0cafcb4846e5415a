"""Label errors: how well does each method find the labels that noise made wrong?

Paper: no figure of its own; the label-error reading of example-tied dropout. What the methods are, and on what
evidence they judge: docs/mislabels.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.captions import count, mean_and_std, of_fewer_runs, spread_over
from analysis.cells import Cell, over_seeds
from analysis.drawn import Drawn, Options, Outcome, Skipped, source_of
from analysis.dropouts import TIED, config_of
from analysis.load import Results
from analysis.means import spread_of
from analysis.style import REFERENCE, Stroke, house_style, new_figure, place_legend_below
from analysis.tables import MISSING, Column, Table
from memlib.errors import InputError
from memlib.mislabel_evaluation import evaluate_mislabels
from memlib.mislabels import Mislabels
from memlib.run_mislabels import from_cross_validation, from_training, trained_examples

METHODS = ("margin_drop", "loss_rise", "loss", "aum", "forgetting_events", "cleanlab")  # from top to bottom
MEASURES: Mapping[str, tuple[str, Stroke]] = {
    "auroc": ("AUROC", Stroke("#56B4E9", "", "o")),
    "average_precision": ("average precision", Stroke("#CC79A7", "", "s")),
    "precision_at_noise_count": ("precision at the noise count", Stroke("#E69F00", "", "D")),
}
_JUDGED = ("run_id", "seed", "example_id", "split", "mode", "assigned", "is_noisy", "prediction", "margin", "loss")
_UNUSED = ("dataset", "model", "seed", "setting")  # the same in all of a run's rows
_KIND = ["folds", "epochs"]  # of a cross-validation
_FLAGGED = ("issue_precision", "issue_recall")
_ROW = 0.28  # inches a method


@dataclass(frozen=True, eq=False)
class Found:
    """The measures of every run and method, a column each, and why a method could not judge, None if all could.

    Of a method that judges by cross-validation they also hold the folds and epochs, the same in all runs.
    """

    measures: pl.DataFrame
    without: str | None


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield the label-error figure, one a cell: every method's AUROC, average precision and precision at the count.

    Of runs without dropout and with example-tied dropout; its other controls say nothing about labels.
    """
    judged = [cell for cell in results.cells if config_of(results, cell).dropout.kind in ("none", TIED)]
    for cell in judged:  # one after the other: their examples are most of all rows there are
        rows = results.collect(results.scan("examples", cell).filter(split="train").select(_JUDGED))
        if not rows.is_empty():
            yield _draw(f"mislabels-{cell.stem}", cell, rows, results=results)


def find(results: Results, cell: Cell, examples: pl.DataFrame) -> Found:
    """Return the measures of each run and method: run_id, seed, method, evidence, folds, epochs and the measures.

    examples: the cell's rows of table `examples`; runs without noisy ones are left out.
    """
    evidence = {
        name: results.collect(results.scan(name, cell).drop(*_UNUSED, "unit_id"))
        for name in ("dynamics", "cross_validation")
    }
    parts = {name: rows.partition_by("run_id", as_dict=True) for name, rows in evidence.items()}
    by_run = examples.partition_by("seed", "run_id", as_dict=True)
    rows, without = [], None
    for seed, run_id in sorted(by_run):
        trained = trained_examples(by_run[seed, run_id].to_arrow())
        if not trained.is_noisy.any():
            continue
        dynamics, folds = (parts[name].get((run_id,), evidence[name].clear()) for name in evidence)
        by_training = from_training(trained, dynamics.to_arrow())
        rows += [_row(run_id, seed, verdict, trained.is_noisy) for verdict in by_training.values()]
        for kind, chosen in folds.partition_by(_KIND, as_dict=True).items():
            try:
                by_folds = from_cross_validation(trained, chosen.to_arrow())
            except InputError as error:
                without = str(error)
                break
            rows += [_row(run_id, seed, verdict, trained.is_noisy, kind) for verdict in by_folds.values()]
    if not rows:
        return Found(pl.DataFrame(), without)
    found = pl.DataFrame(rows, infer_schema_length=None)
    kinds = _spell_kinds(found)
    measures = _of_common_folds(found) if kinds else found
    if kinds and not _spell_kinds(measures):
        without = (
            f"cleanlab: the runs were cross-validated with different settings ({kinds}); give all the same "
            "cross_validation.folds and epochs"
        )
    return Found(measures, without)


def _of_common_folds(measures: pl.DataFrame) -> pl.DataFrame:
    """Return the measures by one kind of cross-validation alone: one that all runs have which have any.

    Of several the one with the most folds, then the most epochs; without any, those of the other methods are left.
    """
    by_folds = measures.filter(pl.col("folds").is_not_null())
    counted = by_folds.group_by(_KIND).agg(n_runs=pl.col("run_id").n_unique())
    common = counted.filter(n_runs=by_folds["run_id"].n_unique()).sort(_KIND).tail(1)
    return pl.concat([measures.filter(pl.col("folds").is_null()), by_folds.join(common, on=_KIND, how="semi")])


def _spell_kinds(measures: pl.DataFrame) -> str:
    """Return the kinds of cross-validation behind the measures, e.g. "2 folds, 30 epochs / 5 folds, 30 epochs"."""
    kinds = measures.select(_KIND).drop_nulls().unique().sort(_KIND)
    return " / ".join(f"{count(folds, 'fold')}, {count(epochs, 'epoch')}" for folds, epochs in kinds.iter_rows())


def _row(
    run_id: str, seed: int, verdict: Mislabels, is_noisy: np.ndarray, kind: Sequence[int | None] = (None, None)
) -> dict[str, object]:
    facts = {"run_id": run_id, "seed": seed, "method": verdict.method, "evidence": verdict.evidence}
    return {**facts, **dict(zip(_KIND, kind, strict=True)), **asdict(evaluate_mislabels(verdict, is_noisy))}


def _draw(name: str, cell: Cell, rows: pl.DataFrame, *, results: Results) -> Outcome:
    found = find(results, cell, rows)
    if found.measures.is_empty():
        return Skipped(name, "its runs have no wrong labels to find; set noise.fraction above 0 and train again")
    measures = found.measures
    source = source_of("examples", rows.select("run_id", "seed").join(measures, on="run_id", how="semi"))
    source = replace(source, units=_units_behind(measures, results, cell))
    n_noisy, n = (int(measures[column].to_numpy().max()) for column in ("n_noisy", "n"))
    fewer = of_fewer_runs(over_seeds(measures, by=["method"], value="auroc"), source.n_runs, by=["method"])
    caption = (
        f"For {cell.title}: how well the score of each method ranks the {n_noisy} examples with a wrong label "
        f"before the others of {n}: the probability that a noisy example scores above a clean one (AUROC; chance 0.5, "
        "dotted), average precision, and the share of noisy ones among as many top scores as there are (chance of "
        f"both: {n_noisy / n:.2g}, dotted). Flagged is what a method calls an issue by its own rule, knowing neither "
        f"the wrong labels nor their number. {_name_folds(measures)}"
        f"{spread_over(source.seeds)}{fewer}"
        f"{'' if found.without is None else f' Not drawn: {found.without}'}"
    )
    figure, title = _plot(cell.title, measures, share=n_noisy / n), f"Label errors found: {cell.title}"
    return Drawn(figure, name, title, caption, source, (_table(measures, title, caption),))


def _units_behind(measures: pl.DataFrame, results: Results, cell: Cell) -> tuple[str, ...]:
    """Return the units of cross-validation that the measures come from."""
    by_folds = measures.drop_nulls(_KIND)
    if by_folds.is_empty():
        return ()
    units = results.collect(results.scan("cross_validation", cell).select("unit_id", "run_id", *_KIND).unique())
    return tuple(units.join(by_folds, on=["run_id", *_KIND], how="semi")["unit_id"].unique().sort())


def _name_folds(measures: pl.DataFrame) -> str:
    kinds = _spell_kinds(measures)
    return f"Cleanlab judges by cross-validation ({kinds}). " if kinds else ""


def _methods_of(measures: pl.DataFrame) -> list[str]:
    return [method for method in METHODS if method in measures["method"]]


def _table(measures: pl.DataFrame, title: str, caption: str) -> Table:
    """Return the means over seeds, a row a method."""
    titles = [*(title for title, _ in MEASURES.values()), "flagged: precision", "flagged: recall"]
    rows = []
    for method in _methods_of(measures):
        chosen = measures.filter(method=method)
        numbers = [_spell(over_seeds(chosen, by=["method"], value=column)) for column in [*MEASURES, *_FLAGGED]]
        runs = chosen.height, measures["run_id"].n_unique()
        judged = "" if runs[0] == runs[1] else f" ({runs[0]} of {count(runs[1], 'run')})"
        rows.append((f"{method}{judged}", chosen["evidence"][0].replace("_", " "), *numbers))
    return Table(title, caption, tuple(map(Column, ["method", "evidence", *titles])), tuple(rows))


def _spell(means: pl.DataFrame) -> str:
    """Return mean and spread; a dash where there is none, as for the precision of a method that flags nothing."""
    return MISSING if means.is_empty() else mean_and_std(means["mean"][0], means["std"][0])


def _plot(title: str, measures: pl.DataFrame, *, share: float) -> Figure:
    methods = _methods_of(measures)
    with house_style():
        figure = new_figure(title, height=1.25 + _ROW * len(methods))
        axes = figure.subplots()
        for chance in (0.5, share):
            axes.axvline(chance, color=REFERENCE.colour, linestyle=":", linewidth=REFERENCE.width)
        for shift, (column, (label, stroke)) in zip((-0.2, 0.0, 0.2), MEASURES.items(), strict=True):
            means = over_seeds(measures, by=["method"], value=column)
            _plot_measure(axes, means, methods, shift=shift, stroke=stroke, label=label)
        axes.set_yticks(range(len(methods)), [method.replace("_", " ") for method in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        place_legend_below(figure, axes, columns=2)  # three do not fit beside each other
    return figure


def _plot_measure(
    axes: Axes, means: pl.DataFrame, methods: list[str], *, shift: float, stroke: Stroke, label: str
) -> None:
    chosen = pl.DataFrame({"method": methods}).join(means, on="method", how="left", maintain_order="left")
    axes.errorbar(
        chosen["mean"].to_numpy(),
        np.arange(len(methods)) + shift,
        xerr=spread_of(chosen),
        fmt=stroke.marker,
        color=stroke.colour,
        elinewidth=0.8,
        capsize=1.5,
        label=label,
    )
