"""Figures to files, in several processes where there are many: drawing to PNG and PDF is most of the work."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.style import house_style

_FEW = 12  # figures saved before others are asked to help; a process takes a second to start
_PNG = {"compress_level": 3}  # half the time of the default, a tenth larger


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name`.png and `name`.pdf and return their paths; the same figure gives the same bytes.

    The layout is fixed by this: both files have the same one, and it is found once.
    """
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    FigureCanvasAgg(figure)  # one canvas for the layout and the PNG, so that texts are measured once
    with house_style():
        _fix_layout(figure)
        figure.savefig(png, metadata={"Software": None}, pil_kwargs=_PNG)
        _fix_labels(figure)
        figure.savefig(pdf, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return png, pdf


def _fix_layout(figure: Figure) -> None:
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _fix_labels(figure: Figure) -> None:
    """Leave the axes' labels where the last drawing put them, instead of finding their place again."""
    for axes in figure.axes:
        to_axes = axes.transAxes.inverted().transform
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_label_coords(*to_axes(axis.label.get_transform().transform(axis.label.get_position())))


class Saving(AbstractContextManager["Saving"]):
    """Saves figures here, and from the thirteenth on in `processes` others, if more than one is given.

    Leaving the context waits for all files; raises what a save raised.
    """

    def __init__(self, folder: Path, *, processes: int = 1) -> None:
        self.folder, self.processes = folder, processes
        self._n_saved = 0
        self._pool: ProcessPoolExecutor | None = None
        self._pending: list[Future[tuple[Path, Path]]] = []

    def save(self, figure: Figure, name: str) -> tuple[Path, Path]:
        """Return the paths of the two files, which are there when the context is left."""
        self._n_saved += 1
        if self.processes == 1 or self._n_saved <= _FEW:
            return save(figure, self.folder, name)
        if self._pool is None:  # spawned: polars' threads do not survive a fork
            self._pool = ProcessPoolExecutor(self.processes, mp_context=multiprocessing.get_context("spawn"))
        self._pending.append(self._pool.submit(save, figure, self.folder, name))
        return self.folder / f"{name}.png", self.folder / f"{name}.pdf"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is pending, unless something failed."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for saved in self._pending:
                saved.result()
