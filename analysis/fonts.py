"""The figures' font: that part of DejaVu Sans which names and numbers need.

A PDF holds the glyphs it uses, and picking them from the 6,000 of the whole font takes longer than drawing does.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from fontTools import subset
from matplotlib.font_manager import findfont, fontManager

WHOLE = "DejaVu Sans"  # ships with matplotlib, so files are the same on every machine; for the rarer characters
_PART = "memlib Sans"
_CHARACTERS = (
    *range(0x20, 0x250),  # Latin
    *range(0x370, 0x400),  # Greek
    *range(0x2010, 0x2040),  # dashes, quotation marks, …
    *map(ord, "−√≤≥≈×·→∞"),
)
_DROPPED = (
    "FFTM",  # of the editor that made the font
    *("GDEF", "GPOS", "GSUB"),  # no ligatures are wanted, kerning is in "kern"; two thirds of the time to pick glyphs
)
_NAMES = {1: _PART, 3: _PART, 4: _PART, 6: _PART.replace(" ", ""), 16: _PART}  # by their ids in a font file


@cache
def font_families() -> tuple[str, ...]:
    """Return the families to draw with, in order; made and made known to matplotlib once a process."""
    folder = tempfile.mkdtemp(prefix="memlib-font-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "part.ttf"
    _write_part(path)
    fontManager.addfont(path)
    return _PART, WHOLE


def _write_part(path: Path) -> None:
    options = subset.Options(recalc_timestamp=False, legacy_kern=True)
    options.drop_tables += _DROPPED
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=_CHARACTERS)
    with subset.load_font(findfont(WHOLE), options) as font:
        cutter.subset(font)
        for record in list(font["name"].names):
            if record.nameID in _NAMES:
                where = record.platformID, record.platEncID, record.langID
                font["name"].setName(_NAMES[record.nameID], record.nameID, *where)
        subset.save_font(font, str(path), options)
