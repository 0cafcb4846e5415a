"""The page of measurements says what was measured: its tables are written from bench/results."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import all as scripts
        import report

        yield scripts, report
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_the_tables_of_the_page_are_those_of_the_results(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert bench[1].main() == 0, "run python bench/report.py"


def test_only_what_lies_between_the_marks_is_replaced(bench):
    page = "before\n<!-- table: training -->\nold\n<!-- end -->\nafter\n"
    row = {"way": "(a) ours", "seconds": 0.25, "n": 3, "missing": None}
    machine = {"device": "cpu", "cpu_model": "AMD EPYC", "threads": 1, "date": "2026-11-26"}
    filled = bench[1].fill(page, {"training": {**machine, "rows": [row]}})
    assert filled.startswith("before\n<!-- table: training -->\nAMD EPYC, 1 thread, 2026-11-26\n")
    assert "| (a) ours | 0.25 | 3 |  |" in filled
    assert filled.endswith("<!-- end -->\nafter\n")
    assert "old" not in filled
    assert bench[1].fill(filled, {}).count("`bench/results/training.json` is missing") == 1


def test_every_kind_of_work_has_its_line_measured_or_not(bench):
    rows = list(bench[1].summary_rows({}))
    assert {row[1] for row in rows} == {"not measured"}
    text = " ".join(row[0] for row in rows)
    for work in ("training", "evaluation", "rewinding", "retraining", "unit search", "dropout", "loading", "figures"):
        assert work in text


def test_every_benchmark_is_run_by_the_one_command(bench):
    run = {*(benchmark.script for benchmark in bench[0].BENCHMARKS), *bench[0].BY_HAND}
    saving = {p.name for p in (ROOT / "bench").glob("*.py") if re.search(r'"--save"', p.read_text())} - {"all.py"}
    assert saving <= run, saving - run


def test_figures_are_reported_by_their_rows_time_and_memory(bench):
    machine = {"device": "cpu", "cpu_model": "AMD EPYC", "threads": 1, "date": "2026-11-26"}
    way = {"way": "a file a unit of work", "seconds": 18.5, "peak_mb_together": 1500}
    results = {"figures": {**machine, "rows": {"epochs": 4_000_000, "examples": 6_000_000}, "ways": [way]}}
    (row,) = [row for row in bench[1].summary_rows(results) if row[0] == "figures"]
    assert row[1] == "10 million rows in 18.5 s, 1.5 GB"
    assert "| a file a unit of work | 18.5 | 1500 |" in bench[1].TABLES["figures"](results)


def test_a_benchmark_without_its_data_is_named_and_not_run(bench):
    scripts, _ = bench
    (search,) = [b for b in scripts.BENCHMARKS if b.script == "critical_units.py"]
    assert "needs CIFAR-10" in scripts.run(search, full=False, data=None)
