"""A sweep whose driver is killed outright at a random moment, again and again, against one that was left alone.

`python bench/driver_kills.py [--kills 20] [--seed 0]` kills the driver (SIGKILL, and with it its Ray) after a
random share of the undisturbed sweep's time and starts the same command again. When the sweep gets through, every
table is compared row by row (wall time, commit and device aside), and the next one starts from nothing. Exit status:
0 all rows are equal and no finished unit was computed again, 1 not so.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from timing import save

from memlib.results import open_results
from memlib.schemas import SCHEMAS
from memlib.storage import open_storage

ROOT = Path(__file__).parent.parent
LIMIT = 1200.0  # seconds for one undisturbed sweep
SETTINGS = ["checkpoints.epochs=[0,2]", "rewinding.limit=50", "retraining.epochs=2", "retraining.limit=50"]
SETTINGS += ["retraining.on=['clean']", "model.width=0.0625", "training.precision=float32"]
SETTINGS += ["critical_units.examples=4", "critical_units.part_size=4", "critical_units.reference_size=16"]
OPTIONS = ["--preset", "quick", "--limit", "200", "--epochs", "12", "--seeds", "0", "--dropouts", "none"]
OPTIONS += [part for setting in SETTINGS for part in ("--set", setting)]


def main() -> int:
    """Kill, compare, print, save."""
    parser = argparse.ArgumentParser(description="Kill a sweep's driver again and again.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memlib-kills-") as folder:
        left_alone = Path(folder, "left_alone")
        seconds = finish(left_alone)
        print(f"left alone: {seconds:.0f} s", flush=True)
        draw, kills, unequal, n = random.Random(given.seed), [], [], 0
        while len(kills) < given.kills:
            results = Path(folder, f"killed_{n}")
            kill = kill_after(results, draw.uniform(0.1, 1.0) * seconds)
            if kill is not None:
                kills.append(kill)
                print(f"killed after {kill['seconds']:.1f} s: {kill}", flush=True)
            if kill is None or len(kills) == given.kills:
                finish(results)
                unequal += [table for table in SCHEMAS if content(left_alone, table) != content(results, table)]
                n += 1
    repeated = sum(kill["rewritten"] for kill in kills)
    print(f"{n} sweeps, {len(kills)} kills; tables that differ: {unequal or 'none'}; units computed again: {repeated}")
    save(
        "driver_kills",
        {"undisturbed_seconds": seconds, "sweeps": n, "unequal": unequal, "rewritten": repeated, "kills": kills},
        torch.device("cpu"),
        seed=given.seed,
    )
    return 1 if unequal or repeated else 0


def start(results: Path) -> subprocess.Popen[bytes]:
    """Start the sweep as a user does."""
    command = [sys.executable, str(ROOT / "sweeps" / "full_paper.py"), *OPTIONS, "--results", str(results)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(results: Path) -> float:
    """Let the sweep run to its end, and return its seconds."""
    started = time.monotonic()
    code = start(results).wait(timeout=LIMIT)
    if code:
        raise RuntimeError(f"the sweep ended with {code}")
    return time.monotonic() - started


def kill_after(results: Path, seconds: float) -> dict[str, float] | None:
    """Start the sweep, kill its driver after `seconds`, and return what was done by then; None if it got through.

    What Ray leaves behind is ended too, once it had its time to end by itself.
    """
    before = finished(results)
    driver = start(results)
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(timeout=seconds)
        return None
    orphans = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(orphans, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    after = finished(results)
    rewritten = sum(after.get(path) != written for path, written in before.items())
    return {"seconds": seconds, "done_before": len(before), "done": len(after), "rewritten": rewritten}


def finished(results: Path) -> dict[str, int]:
    """Return when each file that makes a run or a unit done was written."""
    tables = ("runs", "rewinding", "retraining", "critical_units")
    storage = open_storage(results)
    return {f"{table}/{name}": at for table in tables for name, at in storage.modified(table).items()}


def content(results: Path, table: str) -> collections.Counter[str]:
    """Return the rows of a table, without what differs between equal runs."""
    rows = open_results(results).read(table).to_pylist()
    return collections.Counter(
        repr({name: value for name, value in row.items() if name not in ("seconds", "code_version", "device")})
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
