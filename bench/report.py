"""Write the tables of docs/performance.md from bench/results/*.json, and print the summary.

The page is written by hand but for what lies between `<!-- table: NAME -->` and `<!-- end -->`, which this
replaces. `--check` changes nothing and fails if the page is not what it would write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
SUMMARY = ("work", "reached", "times as fast as the obvious way", "floor", "share of the floor", "measured on")
NOT_MEASURED = "not measured"
N_REWOUND, SHARE_BEHIND = 90, 0.51  # 10 epochs x 9 groups; of ResNet-9's FLOPs, behind a group on average
Content = Mapping[str, Any]
Row = tuple[str, ...]


def load(folder: Path) -> dict[str, Content]:
    """Return what the benchmarks kept, by name; a benchmark of several parts by name and part."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def fill(page: str, results: Mapping[str, Content]) -> str:
    """Return the page with every table written anew.

    Raises:
        KeyError: the page has a table nobody writes.
    """
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]](results)}\n{found[4]}", page)


def summary_rows(results: Mapping[str, Content]) -> Iterator[Row]:
    """Yield the summary: a row for each kind of work, measured or not."""
    for work, (name, row_of) in SUMMARIES.items():
        content = results.get(name)
        if content is None:
            yield (work, NOT_MEASURED, "", "", "", "")
        else:
            yield (work, *row_of(content), where(content))


def where(content: Content) -> str:
    """Return machine and date in short."""
    cpu = content.get("cpu_model") or f"CPU with {content['cpu']}"
    device = cpu if content["device"] == "cpu" else content["device"]
    return f"{device}, {content['threads']} thread{'s' * (content['threads'] > 1)}, {content['date']}"


def markdown(head: Sequence[str], rows: Iterator[Row]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _training(content: Content) -> Row:
    row, obvious = content["rows"][0], next(r for r in content["rows"] if r["way"].startswith("(c)"))
    precision = "bfloat16" if "bfloat16" in row["way"] else "float32"
    rate = content["matrix_rates"][precision]
    share = row["flops_per_second"] / rate
    reached = f"{_n(row['images_per_second'])} images/s, {precision}"
    return (reached, _n(obvious["ratio"]), f"{rate / 1e9:.0f} GFLOP/s, matrix product in {precision}", _share(share))


def _evaluation(content: Content) -> Row:
    ours = content["rows"][0]
    share = content["floor_seconds"] / ours["seconds"]
    reached = f"{_n(content['images'] / ours['seconds'])} images/s, float32"
    return (reached, _n(ours["times_as_fast"]), "forward FLOPs at the float32 matrix rate", _share(share))


def _rewinding(content: Content) -> Row:
    ours = content["rows"][0]
    flops = content["images"] * content["forward_flops"] * (1 + SHARE_BEHIND * N_REWOUND)
    share = flops / content["float32_matrix_rate"] / ours["seconds"]
    reached = f"{_n(N_REWOUND * content['images'] / ours['seconds'])} images/s rewound, float32"
    return (reached, _n(ours["times_as_fast"]), "FLOPs behind each group, the prefix once", _share(share))


def _against_obvious(content: Content) -> Row:
    ours = content["rows"][0]
    return (f"{_n(ours['seconds'])} s", _n(ours.get("times_as_fast", ours.get("ratio"))), "", "")


def _search(content: Content) -> Row:
    ours = content["rows"][0]
    reached = f"{_n(content['examples'] / ours['seconds'])} examples/s, exact, float32"
    return (reached, _n(ours["ratio"]), "", "")


def _dropout(content: Content) -> Row:
    ratio = content["training"]["(b) step with example-tied dropout"]["ratio"]
    alone = content["training"]["(c) the six layers alone"]["ratio"]
    return (
        f"a step takes {_n(ratio)} of one without; the layers alone {alone:.1%}",
        "",
        "a step without",
        _share(1 / ratio),
    )


def _loading(content: Content) -> Row:
    ours = content["rows"][0]
    reached = f"{_n(content['images'] / ours['seconds'])} images/s decoded"
    share = content["floor_seconds"] / ours["seconds"]
    return (reached, _n(ours["times_as_fast"]), "Pillow's decoding alone", _share(share))


def _batches(content: Content) -> Row:
    ours = content["batch_rows"][0]
    share = content["batch_floor_seconds"] / ours["seconds"]
    reached = f"{_n(content['images'] / ours['seconds'])} images/s made batches"
    return (reached, _n(ours["times_as_fast"]), "bytes moved at the memory's bandwidth", _share(share))


def _figures(content: Content) -> Row:
    ours, n_rows = content["ways"][0], sum(content["rows"].values())
    reached = f"{n_rows / 1e6:.0f} million rows in {_n(ours['seconds'])} s, {ours['peak_mb_together'] / 1e3:.1f} GB"
    return (reached, "", "", "")


def _estimates(content: Content) -> Row:
    ratios = [row["ratio"] for row in content["rows"]]
    return (f"sweeps take {min(ratios):.2f} to {max(ratios):.2f} of their estimates", "", "", "")


SUMMARIES: dict[str, tuple[str, Callable[[Content], Row]]] = {
    "training with accounting": ("training", _training),
    "evaluation": ("evaluation", _evaluation),
    "rewinding": ("layers_rewinding", _rewinding),
    "retraining": ("layers_retraining", _against_obvious),
    "unit search": ("critical_units", _search),
    "example-tied dropout": ("example_tied_dropout", _dropout),
    "loading: decoding": ("loading", _loading),
    "loading: batches": ("loading", _batches),
    "figures": ("figures", _figures),
    "time estimates": ("estimates", _estimates),
}


def _ways(
    name: str, rows_of: Callable[[Content], Sequence[Content]] = lambda content: content.get("ways") or content["rows"]
) -> Callable[[Mapping[str, Content]], str]:
    """Return what writes a table of a benchmark's ways: every column its rows have."""

    def table(results: Mapping[str, Content]) -> str:
        content = results.get(name)
        if content is None:
            return f"Not measured yet (`bench/results/{name}.json` is missing)."
        rows = rows_of(content)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        body = (tuple(_cell(row.get(column)) for column in columns) for row in rows)
        return f"{where(content)}\n\n{markdown([c.replace('_', ' ') for c in columns], body)}"

    return table


def _steps(content: Content) -> list[Content]:
    """Return the ways of a training step that `example_tied_dropout.py` keeps by name."""
    return [{"way": way, **measured} for way, measured in content["training"].items()]


def _gpu(results: Mapping[str, Content]) -> str:
    """Return the table of what was measured on GPUs, all models and kinds of work."""
    found = [c for name, c in results.items() if name.startswith("gpu_rates") and not c["tiny"]]
    if not found:
        return "No GPU has been measured yet: `python bench/gpu.py --data ROOT` on a machine with one."
    head = ("device", "model", "work", "images/s", "TFLOP/s", "share of the matrix rate")
    rows = (
        (
            content["device"],
            row["model"],
            row["work"],
            _n(row["images_per_second"]),
            _n(row["flops_per_second"] / 1e12),
            _share(row["share_of_matrix_rate"]),
        )
        for content in found
        for row in content["rows"]
    )
    return markdown(head, rows)


def _cell(value: object) -> str:
    return "" if value is None else _n(value) if isinstance(value, float) else str(value)


def _n(value: float) -> str:
    """Return three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.2f}"


TABLES: dict[str, Callable[[Mapping[str, Content]], str]] = {
    "summary": lambda results: markdown(SUMMARY, summary_rows(results)),
    "gpu": _gpu,
    **{n: _ways(n) for n in ("training", "evaluation", "layers_rewinding", "layers_retraining", "layers_ray")},
    **{n: _ways(n) for n in ("critical_units", "loading", "figures", "estimates")},
    "example_tied_steps": _ways("example_tied_dropout", _steps),
    "example_tied_deployed": _ways("example_tied_dropout", lambda content: content["deployed"]),
}


def main() -> int:
    """Write the page, or check it: 0 it is up to date, 1 it was to be checked and is not."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/performance.md from bench/results.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is out of date")
    options = parser.parse_args()
    results, page = load(RESULTS), PAGE.read_text()
    written = fill(page, results)
    if options.check:
        return int(written != page)
    PAGE.write_text(written)
    for row in summary_rows(results):
        print(" | ".join(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
