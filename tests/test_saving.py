"""A figure's files: the PNG, which is made from the PDF, shows what matplotlib itself would draw."""

import io

import numpy as np
from PIL import Image

from analysis.saving import save
from analysis.style import STROKES, house_style, new_figure


def draw():
    with house_style():
        figure = new_figure("−3 ≤ β → “ž”", height=2.05)
        lines, image = figure.subplots(1, 2)
        for kind, slope in (("clean", 1), ("noisy", -2)):
            stroke = STROKES[kind]
            lines.plot([0, 1, 2], [0, slope, slope], stroke.line, marker=stroke.marker, color=stroke.colour)
        lines.fill_between([0, 1, 2], -1, 1, alpha=0.2)
        lines.set_ylabel("share, $10^{-3}$")
        image.imshow(np.arange(64).reshape(8, 8), interpolation="nearest")
    return figure


def pixels(picture):
    with Image.open(picture) as opened:
        return np.asarray(opened.convert("RGB"), dtype=float)


def test_the_picture_is_as_matplotlib_draws_it_at_200_pixels_an_inch(tmp_path):
    figure = draw()
    png, pdf = save(figure, tmp_path, "a")
    assert pdf.read_bytes().startswith(b"%PDF")
    with Image.open(png) as opened:
        assert opened.size == (660, 410)
        assert round(opened.info["dpi"][0]) == 200
    drawn = io.BytesIO()
    with house_style():
        figure.savefig(drawn, format="png", dpi=200)  # in the layout that saving found
    ours, reference = pixels(png), pixels(drawn)
    assert np.abs(ours - reference).mean() < 0.1 * (255 - reference).mean()  # edges are smoothed otherwise
    blocks = [shown[:400, :660].reshape(20, 20, 33, 20, 3).mean(axis=(1, 3)) for shown in (ours, reference)]
    assert np.abs(blocks[0] - blocks[1]).max() < 12  # of 255, and no part is missing
