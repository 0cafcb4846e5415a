"""Which setting of a search is best, by held-out training examples alone; no torch.

Held-out examples are judged against their assigned labels, a known share of them wrong; neither the test set nor
which labels are wrong is looked at before the choice is made.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]  # of table `dropout_search`

AXES = ("width", "after", "peak_lr", "p_gen", "p_mem")  # what trials of one search differ in, beside the seed
CONTROL_AXES = ("width", "peak_lr")  # what a control shares with its trials
PAPER_GAINS = {"cifar10": 3.4, "mnist": 0.3, "svhn": 0.1}  # points on test, Table 1: after dropping minus before
_SETTING = (*AXES, "batchnorm")


def best_setting(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, one a seed, of the setting with the highest mean validation accuracy; none if there is none.

    A setting is a combination of the axes and of `batchnorm`. Only trials trained to the end count, and settings with
    more of them (one a seed) come first.
    """
    settings = finished_settings(rows)
    return max(settings, key=lambda chosen: (len(chosen), mean_of(chosen, "validation_accuracy")), default=[])


def finished_settings(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of trials trained to the end with example-tied dropout: a list a setting, a row a seed."""
    settings: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["dropout"] == "example_tied" and not row["stopped_early"]:
            settings[tuple(row[name] for name in _SETTING)].append(row)
    return [sorted(settings[setting], key=lambda row: row["seed"]) for setting in sorted(settings)]


def controls_of(chosen: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
    """Return the finished trials without dropout of the chosen setting's width, learning rate and seeds, by seed."""
    wanted = {(row["seed"], *(row[name] for name in CONTROL_AXES)) for row in chosen}
    controls = [row for row in rows if row["dropout"] == "none" and not row["stopped_early"]]
    found = [row for row in controls if (row["seed"], *(row[name] for name in CONTROL_AXES)) in wanted]
    return sorted(found, key=lambda row: row["seed"])


def gains_on_test(chosen: Sequence[Row], rows: Iterable[Row]) -> list[float]:
    """Return, by seed, test accuracy with the memorization neurons dropped minus that of the control without dropout.

    Seeds whose control is missing are left out.
    """
    control = {row["seed"]: row["test_accuracy"] for row in controls_of(chosen, rows)}
    return [row["test_accuracy"] - control[row["seed"]] for row in chosen if row["seed"] in control]


def with_control(chosen: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
    """Return those of the chosen rows, one a seed, whose control is finished."""
    seeds = {row["seed"] for row in controls_of(chosen, rows)}
    return [row for row in chosen if row["seed"] in seeds]


def gains_on_dropping(chosen: Sequence[Row], rows: Iterable[Row]) -> list[float]:
    """Return, by seed, test accuracy with the memorization neurons dropped minus that with all neurons on.

    Both of one network with the statistics of training, as in the paper's Table 1, whatever those of the choice are.
    """
    runs = {row["run_id"] for row in chosen}
    found = [row for row in rows if row["run_id"] in runs and row["scaled_test_accuracy"] is not None]
    return [row["test_accuracy"] - row["scaled_test_accuracy"] for row in sorted(found, key=lambda row: row["seed"])]


def paper_gain(dataset: str) -> str:
    """Return that difference in the paper's Table 1, in words and points."""
    points = PAPER_GAINS.get(dataset)
    if points is None:
        return f"{PAPER_GAINS['cifar10']:+.1f} on CIFAR-10, nothing for this data set"
    return f"{points:+.1f}"


def mean_of(rows: Iterable[Row], column: str) -> float:
    """Return the mean of a column over the rows."""
    return statistics.fmean(row[column] for row in rows)
