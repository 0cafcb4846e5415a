"""Draw docs/images/critical_units_trade_off.png from bench/results/critical_units.json: what speed costs the search.

(a) the share of examples whose units are the exact search's, in its order, against how many times as fast as the
plain loop a search is; (b) the rank correlation of the number of units, of the same searches; (c) the error of the
drop in training accuracy against the time, where edited networks are judged on fewer images. Large: the settings of
the preset laptop. Hollow: another verdict, clean against noisy, than the exact search (all images) gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.style import PAGE_WIDTH, RESOLUTION, STROKES, house_style, new_figure, place_legend_below

BENCH = Path(__file__).parent
DRAWN = BENCH.parent / "docs" / "images" / "critical_units_trade_off.png"
PRECISIONS = {"float32": STROKES["clean"], "bfloat16": STROKES["noisy"]}
CHOSEN = ("256 / 1 / 1", "1000")  # settings of preset laptop: its search, and its number of judged images
LOWEST = 0.9  # rank correlation that a fast search is to reach
Row = Mapping[str, Any]


def plot(measured: Mapping[str, Any]) -> Figure:
    """Return the figure of one benchmark's result."""
    searches, judged = [row for row in measured["rows"] if "precision" in row], measured["judged"]
    with house_style():
        figure = new_figure(_title(measured), height=3.0, width=PAGE_WIDTH)
        same, numbers, drops = figure.subplots(1, 3)
        settings = [_settings(row) for row in searches]
        _plot_points(same, searches, ("ratio", "same_sequence"), settings)
        _plot_points(numbers, searches, ("ratio", "spearman"), settings)
        _plot_points(drops, judged, ("seconds", "drop_error"), [str(row["images"]) for row in judged])
        _write_names(same, searches, ("ratio", "same_sequence"), settings)
        _write_names(drops, judged, ("seconds", "drop_error"), [str(row["images"]) for row in judged])
        for axes in (same, numbers, drops):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.margins(0.2, 0.25)
        lowest = math.floor(10 * min(row["same_sequence"] for row in searches)) - 1
        same.set_yticks([tenth / 10 for tenth in range(lowest, 11)])
        same.set_ylim(lowest / 10, 1.15)  # room for the names of those that agree
        numbers.set_ylim(LOWEST, 1.005)
        same.set(title="(a) same units", xlabel="times as fast as the plain loop", ylabel="share of examples")
        numbers.set(title="(b) number of units", xlabel=same.get_xlabel(), ylabel="Spearman")
        drops.set(title="(c) images judged", xlabel="seconds", ylabel="error of the drop in accuracy")
        place_legend_below(figure, same)
    return figure


def _plot_points(axes: Axes, rows: Sequence[Row], columns: tuple[str, str], names: Sequence[str]) -> None:
    verdict = rows[0]["verdict"]  # of the exact search, or on all images
    labelled = set()
    for row, name in zip(rows, names, strict=True):
        stroke = PRECISIONS[row["precision"]]
        axes.plot(
            *(row[column] for column in columns),
            stroke.marker,
            color=stroke.colour,
            markerfacecolor=stroke.colour if row["verdict"] == verdict else "white",
            markersize=6 if name in CHOSEN else 3.5,
            label="_" if row["precision"] in labelled else row["precision"],  # one entry each in the legend
        )
        labelled.add(row["precision"])


def _write_names(axes: Axes, rows: Sequence[Row], columns: tuple[str, str], names: Sequence[str]) -> None:
    for row, name in zip(rows, names, strict=True):
        at = tuple(row[column] for column in columns)
        # tilted, so that names of neighbouring points stand side by side
        axes.annotate(name, at, (1, 5), textcoords="offset points", fontsize=5.5, rotation=50, rotation_mode="anchor")


def _settings(row: Row) -> str:
    return f"{row['reference_size']} / {row['reference_copies']} / {row['refresh']}"


def _title(measured: Mapping[str, Any]) -> str:
    network = measured["network"]
    return (
        "Search for critical units: reference examples / their copies / steps between refreshes\n"
        f"ResNet-9, half width, {network['images']} CIFAR-10 images, {measured['examples']} examples, "
        f"{measured['threads']} thread"
    )


def main() -> None:
    """Draw it."""
    measured = json.loads((BENCH / "results" / "critical_units.json").read_text())
    with house_style():
        plot(measured).savefig(DRAWN, dpi=RESOLUTION, metadata={"Software": None})


if __name__ == "__main__":
    main()
