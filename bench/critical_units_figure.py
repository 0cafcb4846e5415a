"""Draw docs/images/critical_units_trade_off.png from bench/results/critical_units.json: what speed costs the search.

(a) the share of examples whose units are the exact search's, in its order, against how many times as fast as the
plain loop a search is; (b) the rank correlation of the number of units; (c) the error of the drop in training
accuracy against the time, where edited networks are judged on fewer images. Hollow: another verdict, clean
against noisy, than the exact search (all images) gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.style import PAGE_WIDTH, STROKES, Stroke, house_style, new_figure, place_legend_below

BENCH = Path(__file__).parent
DRAWN = BENCH.parent / "docs" / "images" / "critical_units_trade_off.png"
PRECISIONS = {"float32": STROKES["clean"], "bfloat16": STROKES["noisy"]}
CHOSEN = ("256 / 1 / 1", "1000")  # settings of preset laptop: its search, and its number of judged images
Row = Mapping[str, Any]


def plot(measured: Mapping[str, Any]) -> Figure:
    """Return the figure of one benchmark's result."""
    searches = [row for row in measured["rows"] if "precision" in row]
    with house_style():
        figure = new_figure(_title(measured), height=3.0, width=PAGE_WIDTH)
        same, numbers, drops = figure.subplots(1, 3)
        for axes, value in ((same, "same_sequence"), (numbers, "spearman")):
            _plot_points(axes, searches, ("ratio", value), {id(row): _settings(row) for row in searches})
            axes.set_xscale("log")
            axes.set_xlabel("times as fast as the plain loop")
        same.set_ylabel("share of examples with the same units")
        numbers.set_ylabel("Spearman of the number of units")
        judged = measured["judged"]
        _plot_points(drops, judged, ("seconds", "drop_error"), {id(row): f"{row['images']}" for row in judged})
        drops.set_xlabel("seconds of judging")
        drops.set_ylabel("error of the drop in accuracy")
        titles = ("(a) sequences", "(b) numbers", "(c) images judged")
        for axes, title in zip((same, numbers, drops), titles, strict=True):
            axes.set_title(title)
            axes.margins(0.15)
        place_legend_below(figure, same)
    return figure


def _plot_points(axes: Axes, rows: list[Row], columns: tuple[str, str], names: Mapping[int, str]) -> None:
    verdict = rows[0]["verdict"]  # of the exact search, or on all images
    for precision, stroke in PRECISIONS.items():
        label = precision
        for row in (row for row in rows if row["precision"] == precision):
            x, y = (row[column] for column in columns)
            _mark(axes, (x, y), stroke, filled=row["verdict"] == verdict, label=label)
            weight = "bold" if names[id(row)] in CHOSEN else "normal"
            axes.annotate(names[id(row)], (x, y), (3, 3), textcoords="offset points", fontsize=5.5, fontweight=weight)
            label = "_"  # one entry a precision in the legend


def _mark(axes: Axes, at: tuple[float, float], stroke: Stroke, *, filled: bool, label: str) -> None:
    face = stroke.colour if filled else "white"
    axes.plot(*at, stroke.marker, color=stroke.colour, markerfacecolor=face, label=label)


def _settings(row: Row) -> str:
    return f"{row['reference_size']} / {row['reference_copies']} / {row['refresh']}"


def _title(measured: Mapping[str, Any]) -> str:
    network = measured["network"]
    return (
        f"Search for critical units: reference examples / their copies / steps between refreshes\n"
        f"ResNet-9, half width, {network['images']} CIFAR-10 images, {measured['examples']} examples, "
        f"{measured['threads']} thread"
    )


def main() -> None:
    """Draw it."""
    measured = json.loads((BENCH / "results" / "critical_units.json").read_text())
    with house_style():
        plot(measured).savefig(DRAWN, metadata={"Software": None})


if __name__ == "__main__":
    main()
