"""A figure to its files."""

from __future__ import annotations

import io
from pathlib import Path

import pypdfium2
from matplotlib.figure import Figure

from analysis.style import RESOLUTION, house_style

_COMPRESSION = 3  # of the PNG: half the time of the default, a tenth larger


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name`.pdf and `name`.png and return the paths, PNG first; the same figure gives the same bytes.

    The PNG is the PDF's page in pixels: they look the same, and matplotlib, which takes four times as long, draws once.
    The layout is fixed by this.
    """
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    written = io.BytesIO()
    with house_style():
        _fix_layout(figure)
        no_dates = {"CreationDate": None, "Creator": None, "Producer": None}
        figure.savefig(written, format="pdf", dpi=RESOLUTION, metadata=no_dates)
    pdf.write_bytes(written.getvalue())
    _write_png(written.getvalue(), png)
    return png, pdf


def _fix_layout(figure: Figure) -> None:
    """Find the layout; matplotlib itself would draw a second time for it."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _write_png(pdf: bytes, path: Path) -> None:
    # Pixels that are begun are whole ones; a page of 237.6 points, which pdfium measures as 237.600006, is 660.
    scale = RESOLUTION / 72 * (1 - 1e-6)
    with pypdfium2.PdfDocument(pdf) as document:
        bitmap = document[0].render(scale=scale)  # pyright: ignore[reportArgumentType] - "int", after its default
        bitmap.to_pil().save(path, dpi=(RESOLUTION, RESOLUTION), compress_level=_COMPRESSION)
