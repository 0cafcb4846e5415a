"""All figures from large results, by the command itself in a process of its own, on 2 cores.

The results are made up as the paper's sweep would leave them (`made_up_results.py`), in many small files, and
once more after `compact`. What is measured: wall and CPU seconds of all its processes, the largest one's peak
memory, and the most that all of them had at once. `--save` keeps it in bench/results/figures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from made_up_results import make_up_results
from timing import save

from memlib.results import create_results

ROOT = Path(__file__).parent.parent
_BETWEEN_LOOKS = 0.05  # seconds


def measure_command(results: Path, figures: Path, cores: int) -> dict[str, object]:
    """Return what drawing all figures of `results` took, on that many cores."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    started = time.perf_counter()
    command = [sys.executable, "analysis/figures.py", "--results", str(results), "--figures", str(figures)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as drawing:
        os.sched_setaffinity(drawing.pid, allowed)
        largest, together = _watch(drawing)
        printed = drawing.stdout.read() if drawing.stdout else ""
    seconds = time.perf_counter() - started
    if drawing.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {drawing.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 1),
        "files": len(list(results.glob("*/*.parquet"))),
        "figures": printed.count(".png"),
        "cpu_seconds": round(cpu, 1),
        "peak_mb_of_one_process": round(largest / 1e6),
        "peak_mb_together": round(together / 1e6),
    }


def _watch(drawing: subprocess.Popen[str]) -> tuple[int, int]:
    """Wait, and return the most memory in bytes that one process had, and that all it started had at once.

    Not the system's own record of children: it begins with what this process had when it started them.
    """
    process, largest, together = psutil.Process(drawing.pid), 0, 0
    while drawing.poll() is None:
        resident = [_resident(one) for one in [process, *_children(process)]]
        largest, together = max(largest, *resident), max(together, sum(resident))
        time.sleep(_BETWEEN_LOOKS)
    return largest, together


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it has ended
        return 0


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description="Time all figures from large results.")
    parser.add_argument("--rows", type=float, default=1e7)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/figures.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results, figures = Path(folder) / "results", Path(folder) / "figures"
        store = create_results(results)
        counts = make_up_results(store, int(options.rows))
        print(f"{sum(counts.values())} rows: {json.dumps(counts)}", flush=True)
        measured: dict[str, dict[str, object]] = {
            "a file a unit of work": measure_command(results, figures, options.cores)
        }
        store.compact()
        measured["compacted"] = measure_command(results, figures, options.cores)
        for way, found in measured.items():
            print(f"{way}: {json.dumps(found)}")
    if options.save:
        ways = [{"way": way, **found} for way, found in measured.items()]
        save("figures", {"rows": counts, "ways": ways}, torch.device("cpu"), cores_used=options.cores)


if __name__ == "__main__":
    main()
