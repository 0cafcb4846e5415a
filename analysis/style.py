"""One look for every figure: column width, colours everyone can tell apart, files that come out the same twice."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from analysis.fonts import font_families

COLUMN_WIDTH = 3.3  # inches, one column of a two-column page
PAGE_WIDTH = 6.9  # inches, both columns and the gap
RESOLUTION = 200  # pixels an inch
_NARROWEST_COLUMN = 1.7  # inches, of several side by side
_TITLE_CHARACTERS = 46  # a line of title at column width
_MOST_GROUP_LABELS = 24  # side by side at column width, upright
_MOST_ROW_LABELS = 36  # below each other, at the height of the tallest heat map
_LONGEST_GROUP_LABEL = 20  # characters
_LONGEST_COLUMN_TITLE = 28  # characters
_CHARACTER = 0.055  # inches, of a tick label


@dataclass(frozen=True)
class Stroke:
    """How one kind of thing is drawn: told apart by colour, by line and by marker."""

    colour: str
    line: str
    marker: str
    width: float = 1.2  # points


# Okabe and Ito's colour-blind safe palette; the same kind looks the same in every figure.
STROKES: Mapping[str, Stroke] = {
    "clean": Stroke("#0072B2", "-", "o"),
    "noisy": Stroke("#D55E00", "--", "s"),
    "test": Stroke("#009E73", "-.", "D"),
    "total": Stroke("#000000", ":", "^"),
}
DIVERGING = "RdBu"  # red below 0, blue above; ColorBrewer, colour-blind safe
MISSING = "#BBBBBB"
REFERENCE = Stroke("#777777", "-", "", 0.8)
SEQUENCE = "viridis"  # perceptually uniform, colour-blind safe, and in order of lightness when printed grey
_LIGHTEST = 0.85  # of the sequence: its yellow end is too light on white

_FACES = ("rm", "it", "bf", "bfit", "sf", "tt", "cal")  # of mathematical text: all are looked for, whatever is used

_STYLE: Mapping[str, object] = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.titley": 1.0,
    "axes.labelsize": 7.5,
    "figure.titlesize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.hinting": "no_hinting",  # as in the PDF, and it takes a third less time to measure
    "pdf.fonttype": 42,  # text stays text
}


@contextmanager
def house_style() -> Iterator[None]:
    """Run a block in our style, whatever the user's matplotlib is set to, and give their settings back."""
    defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    with matplotlib.rc_context():
        matplotlib.rcParams.update(typing.cast(typing.Any, {**defaults, **_STYLE, **_font_settings()}))
        yield


def new_figure(title: str, *, height: float, width: float = COLUMN_WIDTH) -> Figure:
    """Return an empty figure; width and height in inches; long lines of the title are wrapped."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(
        as_it_is("\n".join(_wrap(line, int(_TITLE_CHARACTERS * width / COLUMN_WIDTH)) for line in title.splitlines()))
    )
    return figure


def as_it_is(text: str) -> str:
    """Return a text that may hold a user's names so that matplotlib writes it as it is, and no formula."""
    return text.replace("$", r"\$")


def width_for(n_columns: int) -> float:
    """Return the width in inches of a figure of that many columns: one column's, the page's, or more if it must."""
    return COLUMN_WIDTH if n_columns == 1 else max(PAGE_WIDTH, _NARROWEST_COLUMN * n_columns)


def in_sequence(n: int) -> list[Stroke]:
    """Return n strokes for things that have an order, from dark to light."""
    colours = colormaps[SEQUENCE](np.linspace(0, _LIGHTEST, n))
    return [Stroke(to_hex(colour), "-", "o", 0.9) for colour in colours]


def place_legend(axes: Axes) -> None:
    """Put the legend above the axes, in one row, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, borderpad=0.2)


def place_legend_below(figure: Figure, axes: Axes, *, columns: int = 4) -> None:
    """Put the legend of these axes below the whole figure, for several panels that mean the same by it."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, borderpad=0.2)


def column_titles(every: Sequence[str], drawn: Collection[str]) -> dict[str, str]:
    """Return the title of each drawn model's column; none where the figure's title names the only model."""
    titles = short_names(every, _LONGEST_COLUMN_TITLE) if len(every) > 1 else [""] * len(every)
    return {model: title for model, title in zip(every, titles, strict=True) if model in drawn}


def height_of_labels(names: Iterable[str]) -> float:
    """Return the height in inches that the names of layer groups take below an x axis."""
    return _CHARACTER * min(max(len(name) for name in names), _LONGEST_GROUP_LABEL)


def label_groups(
    axes: Axes,
    names: Sequence[str],
    *,
    vertical: bool = False,
    width: float = COLUMN_WIDTH,
    longest: int = _LONGEST_GROUP_LABEL,
) -> None:
    """Name the layer groups along the x axis (or the y axis), every so many where they are too many to read.

    width: inches the figure has for these axes, labels of the y axis included. longest: characters of a label.
    """
    most = _MOST_ROW_LABELS if vertical else max(int(_MOST_GROUP_LABELS * width / COLUMN_WIDTH), 2)
    positions = range(0, len(names), -(-len(names) // most))
    labels = short_names([names[i] for i in positions], longest, positions)
    if vertical:
        axes.set_yticks(positions, labels)
    else:
        axes.set_xticks(positions, labels, rotation=90)


def short_names(names: Sequence[str], longest: int, places: Iterable[int] | None = None) -> list[str]:
    """Return the names with their middle left out where they are too long; numbered if that makes two alike."""
    labels = [_shorten(name, longest) for name in names]
    if len(set(labels)) == len(labels):
        return labels
    numbered = zip(places or range(len(names)), names, strict=True)
    return [f"{place} {_shorten(name, longest - len(str(place)) - 1)}" for place, name in numbered]


def label_epochs(axes: Axes) -> None:
    """Name the x axis "epoch", with ticks at whole epochs."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")


def fix_range(axes: Axes, first: float, last: float) -> None:
    """Show accuracies from 0 to 1 over x from first to last, with a margin, whatever is drawn.

    Called before drawing: with many panels that share their axes, matplotlib spends most of its time on limits.
    """
    margin = 0.04 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks((0, 0.5, 1))


def use_log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic, from just below the smallest to just above the largest positive value."""
    positive = [v for v in values if v > 0]
    axes.set_yscale("log")
    axes.set_ylim(min(positive) / 1.5, max(positive) * 1.5)
    axes.yaxis.set_minor_formatter("")
    if max(positive) / min(positive) < 100:  # too narrow for powers of ten alone
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:.2g}")


def _font_settings() -> dict[str, object]:
    families = font_families()
    powers = {f"mathtext.{face}": families[0] for face in _FACES}  # powers of ten on axes
    return {"font.family": families, "mathtext.fontset": "custom", **powers}


def _wrap(line: str, longest: int) -> str:
    parts = ", ".join(_shorten(part, longest - 1) for part in line.split(", "))
    return textwrap.fill(parts, longest, break_long_words=False, break_on_hyphens=False)


def _shorten(name: str, longest: int) -> str:
    """Return the name with its middle left out where it is too long: the ends tell names apart."""
    if len(name) <= longest:
        return name
    head = longest // 2 - 1
    return f"{name[:head]}…{name[head + 1 - longest :]}"
