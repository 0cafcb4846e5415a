"""What a search found, in words: the choice by validation, and what it is worth on the test set."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from memlib.config import config_from_json
from memlib.model_selection import (
    Row,
    best_setting,
    controls_of,
    finished_settings,
    gains_on_dropping,
    gains_on_test,
    mean_of,
    paper_gain,
    with_control,
)
from memlib.results import ResultStore
from memlib.trials import TABLE, trial_unit
from sweeps.search_plan import OWN_PLACES, SearchPlan


def print_report(plan: SearchPlan, store: ResultStore, console: Console) -> None:
    """Print what the finished trials of a search say."""
    wanted = {trial_unit(run).unit_id for run in plan.runs}
    rows = [row for row in store.read(TABLE).to_pylist() if row["unit_id"] in wanted]
    for line in report_lines(rows, plan.controls[0].data.name):
        console.print(line)


def report_lines(rows: Sequence[Row], dataset: str) -> list[str]:
    """Return the lines of the report on the rows of one search."""
    trials = [row for row in rows if row["dropout"] == "example_tied" and row["batchnorm"] == "final"]
    n_stopped = sum(row["stopped_early"] for row in trials)
    lines = [f"{len(trials)} trials: {len(trials) - n_stopped} trained to the end, {n_stopped} stopped early"]
    chosen = best_setting(rows)
    if not chosen:
        return [*lines, "no trial was trained to the end yet: nothing to choose from."]
    lines.append(f"best by validation: {_setting(chosen[0])}")
    lines.append(
        f"  validation {_percent(chosen, 'validation_accuracy')} ({_tell_near(chosen, rows)}); "
        "memorization neurons dropped: "
        + ", ".join(f"{split} {_percent(chosen, f'{split}_accuracy')}" for split in ("clean", "noisy", "test"))
    )
    lines.append(_paper_line(chosen, rows, dataset))
    chosen = with_control(chosen, rows)
    controls = controls_of(chosen, rows)
    if not controls:
        return [*lines, "  its control without dropout is not finished: no gain to report."]
    lines.append(
        f"no dropout at the same budget: validation {_percent(controls, 'validation_accuracy')}; "
        + ", ".join(f"{split} {_percent(controls, f'{split}_accuracy')}" for split in ("clean", "noisy", "test"))
    )
    return [*lines, *_gain_lines(chosen, rows)]


def _gain_lines(chosen: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    gain, error = _gain(chosen, rows)
    n_seeds = len(chosen)
    lines = [
        f"gain on test over no dropout: {gain:+.1f} points (± {error:.1f}, sampling of the test images; "
        f"{n_seeds} seed{'s' if n_seeds > 1 else ''})"
    ]
    comparable = [found for found in (with_control(s, rows) for s in finished_settings(rows)) if found]
    highest = max(comparable, key=lambda found: _gain(found, rows)[0])
    lines.append(
        f"largest gain of any setting trained to the end: {_gain(highest, rows)[0]:+.1f} points with "
        f"{_setting(highest[0])} (found by looking at the test set, so too high to expect)"
    )
    return lines


def _paper_line(chosen: Sequence[Row], rows: Sequence[Row], dataset: str) -> str:
    """Return what dropping does to the network's own test accuracy: what the paper's Table 1 compares."""
    gains = gains_on_dropping(chosen, rows)
    own = f"{100 * sum(gains) / len(gains):+.1f} points" if gains else "unknown"
    return f"  dropping changes its own test accuracy by {own} (the paper's Table 1: {paper_gain(dataset)})"


def _tell_near(chosen: Sequence[Row], rows: Sequence[Row]) -> str:
    """Say how many settings validation cannot tell from the chosen one."""
    best = mean_of(chosen, "validation_accuracy")
    held_out = {config_from_json(row["config"]).data_seed: row["n_validation"] for row in chosen}  # each draw once
    error = math.sqrt(best * (1 - best) / sum(held_out.values()))
    finished = finished_settings(rows)
    near = sum(mean_of(found, "validation_accuracy") >= best - error for found in finished)
    return f"± {100 * error:.1f}: {near} of {len(finished)} settings trained to the end lie within that"


def _gain(chosen: Sequence[Row], rows: Sequence[Row]) -> tuple[float, float]:
    """Return the mean gain on test and its standard error from the number of test images, in points.

    All seeds are judged on the same images, so more seeds do not make that smaller.
    """
    gain = 100 * sum(gains := gains_on_test(chosen, rows)) / len(gains)
    means = [mean_of(side, "test_accuracy") for side in (chosen, controls_of(chosen, rows))]
    variance = sum(mean * (1 - mean) for mean in means) / chosen[0]["n_test"]
    return gain, 100 * math.sqrt(variance)


def _setting(row: Row) -> str:
    return (
        f"p_gen {row['p_gen']:g}, p_mem {row['p_mem']:g}, width {row['width']:g}, after {row['after'] or OWN_PLACES}, "
        f"peak_lr {row['peak_lr']:g}, BatchNorm {row['batchnorm']}"
    )


def _percent(rows: Sequence[Row], column: str) -> str:
    values = [row for row in rows if row[column] is not None]
    return f"{100 * mean_of(values, column):.1f} %" if values else "none"
