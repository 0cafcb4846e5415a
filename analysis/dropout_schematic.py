"""Figure 6: a drawing of example-tied dropout, (a) the two kinds of neurons, (b) one example's forward pass.

Paper: Figure 6.
Deviations: (a) shows the neurons of three examples beside each other, (b) what is left after dropping.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise, product

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawn import Drawn, Options, Outcome, source_of
from analysis.dropouts import TIED
from analysis.load import Results
from analysis.style import house_style, new_figure

_GENERALIZATION = ("#56B4E9", "o")  # Okabe and Ito's, but none that stands for a split; told apart by form, too
_MEMORIZATION = ("#E69F00", "s")
_OFF = "#AAAAAA"
_N_GENERALIZATION = 3  # of a layer in panel (a)
_N_MEMORIZATION = 9
_OWNED = ((1, 6), (4,), (2, 7, 8))  # memorization neurons of three examples
_HEIGHTS = (2, 4)  # generalization and memorization neurons of a layer in panel (b)
_PATH = ((1,), (3,), (0, 2))  # memorization neurons that the example owns in each layer of panel (b)
_GAP = 1.0  # between the two kinds
_STEP, _MIDDLE = 1.1, -1.5  # between the layers of panel (b), and the height of its input and output
_BOX = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "black", "linewidth": 0.6}
_SIZE = 6.0  # points, of a neuron

_CAPTION = (
    "Example-tied dropout. (a) A layer has generalization neurons (circles), on for every example, and memorization "
    "neurons (squares), of which each example owns a fixed random few; the others (open) are zero for it. (b) In "
    "training an example passes through the generalization neurons and its own memorization neurons, so that what "
    "only this example can teach is stored in neurons that hardly any other example uses. For use the memorization "
    "neurons are dropped, and what they memorized with them."
)


def draw(results: Results, options: Options) -> Iterator[Outcome]:
    """Yield the drawing if there are runs with example-tied dropout; it shows none of their numbers."""
    runs = results.runs.filter(pl.col("dropout") == TIED)
    if not runs.is_empty():
        yield Drawn(_plot(), "figure6", "Figure 6: example-tied dropout", _CAPTION, source_of("runs", runs))


def _plot() -> Figure:
    with house_style():
        figure = new_figure("Example-tied dropout", height=3.5)
        top, bottom = figure.subplots(2, 1, height_ratios=(4, 6))
        _draw_kinds(top)
        _draw_passes(bottom)
    return figure


def _draw_kinds(axes: Axes) -> None:
    """Draw one layer's neurons in a row, once for each of three examples."""
    axes.set_title("(a) the two kinds of neurons of a layer", loc="left")
    for row, owned in enumerate(_OWNED):
        axes.text(-0.7, -row, f"example {row + 1}", ha="right", va="center")
        for x in range(_N_GENERALIZATION):
            _neuron(axes, x, -row, _GENERALIZATION, on=True)
        for x in range(_N_MEMORIZATION):
            _neuron(axes, _N_GENERALIZATION + _GAP + x, -row, _MEMORIZATION, on=x in owned)
    _bracket(axes, 0, _N_GENERALIZATION - 1, "generalization:\non for all")
    first = _N_GENERALIZATION + _GAP
    _bracket(axes, first, first + _N_MEMORIZATION - 1, "memorization:\neach example owns a few, by its id")
    _frame(axes, (-3.5, first + _N_MEMORIZATION - 0.4), (-2.5, 2.2))


def _bracket(axes: Axes, first: float, last: float, text: str) -> None:
    axes.plot([first - 0.3, first - 0.3, last + 0.3, last + 0.3], [0.5, 0.65, 0.65, 0.5], color="black", linewidth=0.7)
    axes.text((first + last) / 2, 0.8, text, ha="center", va="bottom", linespacing=1.1)


def _draw_passes(axes: Axes) -> None:
    """Draw the forward pass of one example under its own mask, and of any example with the squares dropped."""
    axes.set_title("(b) the forward pass", loc="left")
    _draw_network(axes, 0.0, _PATH, "training:\nthe example's own on")
    _draw_network(axes, 5.6, ((), (), ()), "use:\nmemorization dropped", dropped=True)
    _frame(axes, (-0.6, 10.2), (-5.6, 2.0))


def _draw_network(
    axes: Axes, left: float, owned: Collection[Collection[int]], title: str, *, dropped: bool = False
) -> None:
    right = left + _STEP * (len(owned) + 1)
    layers = [_draw_layer(axes, left + _STEP * (i + 1), own, dropped=dropped) for i, own in enumerate(owned)]
    for before, after in pairwise([[(left, _MIDDLE)], *layers, [(right, _MIDDLE)]]):
        for start, end in product(before, after):
            kind = _MEMORIZATION if min(start[1], end[1]) < -_HEIGHTS[0] else _GENERALIZATION
            axes.plot(*zip(start, end, strict=True), color=kind[0], linewidth=0.8, zorder=1)
    for x, name in ((left, "x"), (right, "y")):
        axes.text(x, _MIDDLE, name, ha="center", va="center", style="italic", bbox=_BOX)
    axes.text((left + right) / 2, 0.7, title, ha="center", va="bottom", linespacing=1.1)


def _draw_layer(axes: Axes, x: float, owned: Collection[int], *, dropped: bool) -> list[tuple[float, float]]:
    """Draw a layer as a column and return the places of the neurons that are on."""
    n_generalization, n_memorization = _HEIGHTS
    on = [(x, float(-i)) for i in range(n_generalization)]
    for place in on:
        _neuron(axes, *place, _GENERALIZATION, on=True)
    for i in range(n_memorization):
        place = (x, -n_generalization - 0.4 - i)
        if dropped:
            axes.plot(*place, "x", color=_OFF, markersize=0.8 * _SIZE, markeredgewidth=0.8)
            continue
        _neuron(axes, *place, _MEMORIZATION, on=i in owned)
        on += [place] if i in owned else []
    return on


def _neuron(axes: Axes, x: float, y: float, kind: tuple[str, str], *, on: bool) -> None:
    colour, marker = kind
    edge, face = ("black", colour) if on else (_OFF, "white")
    axes.plot(x, y, marker, color=edge, markerfacecolor=face, markersize=_SIZE, markeredgewidth=0.6, zorder=2 + on)


def _frame(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis("off")
