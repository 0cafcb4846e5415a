"""Every benchmark of the project, one after the other, each in a process of its own: what `make bench` runs.

`python bench/all.py` takes small sizes: under ten minutes on a machine with nothing else to do; `--full` the sizes
the goals are stated for. One thread and CPU seconds, but for those that are about processes. Each keeps its rows
in bench/results, from which `bench/report.py` writes the tables of docs/performance.md at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A script with its options at both sizes; `needs_data` if it works on CIFAR-10 alone."""

    script: str
    quick: tuple[str, ...]
    full: tuple[str, ...] = ()
    needs_data: bool = False


ONE_THREAD = ("--threads", "1")
SEARCH = ("--images", "1000", "--epochs", "14", "--examples", "8", "--plain", "1")
BENCHMARKS = (
    Benchmark("training.py", ("--batch", "128", "--rounds", "3", *ONE_THREAD)),
    Benchmark("evaluation.py", ("--images", "200", *ONE_THREAD), ("--images", "1000")),
    Benchmark(
        "layers.py",
        ("--parts", "rewinding", "retraining", "--images", "32", "--epochs", "3", "--rounds", "1", *ONE_THREAD),
        ("--images", "500"),
    ),
    Benchmark("critical_units.py", (*SEARCH, *ONE_THREAD), (*ONE_THREAD, "--trade-off"), needs_data=True),
    Benchmark("example_tied_dropout.py", ("--batch", "64", "--rounds", "3", *ONE_THREAD)),
    Benchmark("loading.py", ("--rounds", "3", *ONE_THREAD)),
    Benchmark("figures.py", ("--rows", "1e6")),
    Benchmark("estimates.py", ("--tiny",)),
)
BY_HAND = ("gpu.py", "scale.py", "driver_kills.py")  # those that want a GPU or a cluster of their own


def run(benchmark: Benchmark, *, full: bool, data: Path | None) -> str:
    """Run one benchmark and return what became of it, in words."""
    script = BENCH / benchmark.script
    if not script.exists():
        return "not there"
    if benchmark.needs_data and data is None:
        return "not run: it needs CIFAR-10, give --data ROOT"
    command = [sys.executable, str(script), "--save", *(benchmark.full if full else benchmark.quick)]
    command += ["--data", str(data)] if benchmark.needs_data else []
    print(f"== {benchmark.script} {' '.join(command[2:])}", flush=True)
    started = time.monotonic()
    done = subprocess.run(command, check=False)
    seconds = time.monotonic() - started
    return f"{seconds:.0f} s" if done.returncode == 0 else f"FAILED with status {done.returncode} after {seconds:.0f} s"


def main() -> int:
    """Run all and write the report: 0 all ran, 1 one failed."""
    parser = argparse.ArgumentParser(description="Run every benchmark and write the tables of docs/performance.md.")
    parser.add_argument("--full", action="store_true", help="the sizes the goals are stated for: an hour or more")
    parser.add_argument(
        "--data", type=Path, help="folder with cifar10/train.parquet; without it the search is left out"
    )
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", help="run only these")
    options = parser.parse_args()
    chosen = [b for b in BENCHMARKS if not options.only or b.script in options.only]
    outcomes = {b.script: run(b, full=options.full, data=options.data) for b in chosen}
    reported = subprocess.run([sys.executable, str(BENCH / "report.py")], check=False).returncode
    for script, outcome in outcomes.items():
        print(f"{script:26} {outcome}")
    return int(reported != 0 or any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
