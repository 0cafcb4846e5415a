"""The figure of what speed costs the search for critical units, drawn from a benchmark's rows."""

import importlib.util
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

BENCH = Path(__file__).parent.parent / "bench" / "critical_units_figure.py"
EXACT = {"reference_size": 256, "reference_copies": 5, "refresh": 1, "precision": "float32", "verdict": "clean"}
FAST = {**EXACT, "reference_copies": 1, "precision": "bfloat16", "verdict": "neither"}
JUDGED = {"precision": "float32", "verdict": "clean", "images": 500, "seconds": 9.0, "drop_error": 0.0}
MEASURED = {
    "network": {"images": 500},
    "examples": 8,
    "threads": 1,
    "rows": [
        {**EXACT, "ratio": 7.0, "same_sequence": 1.0, "spearman": 1.0},
        {**FAST, "ratio": 40.0, "same_sequence": 0.9, "spearman": 0.8},
        {"way": "(d) plain loop, scaled", "ratio": 1.0},
    ],
    "judged": [JUDGED, {**JUDGED, "images": 100, "seconds": 2.0, "drop_error": 0.01}],
}


@pytest.fixture(scope="module")
def panels():
    spec = importlib.util.spec_from_file_location("critical_units_figure", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.plot(MEASURED).axes


def points(axes):
    return [(*(v[0] for v in line.get_data()), to_hex(line.get_markerfacecolor())) for line in axes.lines]


def test_every_search_stands_at_its_speed_and_agreement_and_names_its_settings(panels):
    assert [p[:2] for p in points(panels[0])] == [(7.0, 1.0), (40.0, 0.9)]
    assert [p[:2] for p in points(panels[1])] == [(7.0, 1.0), (40.0, 0.8)]
    assert [text.get_text() for text in panels[0].texts] == ["256 / 5 / 1", "256 / 1 / 1"]


def test_a_search_with_another_verdict_is_hollow(panels):
    assert [p[2] == "#ffffff" for p in points(panels[0])] == [False, True]


def test_fewer_judged_images_stand_at_their_time_and_error(panels):
    assert [p[:2] for p in points(panels[2])] == [(9.0, 0.0), (2.0, 0.01)]
    assert [text.get_text() for text in panels[2].texts] == ["500", "100"]
