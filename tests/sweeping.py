"""Sweeps started as a user starts them, for the tests on real Ray."""

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from memlib.checkpoints import CheckpointFolder
from memlib.results import open_results
from memlib.schemas import SCHEMAS
from memlib.storage import open_storage

ROOT = Path(__file__).parent.parent
TINY = ["--preset", "quick", "--limit", "200", "--set", "model.width=0.0625", "--set", "training.precision=float32"]
TINY += ["--dropouts", "none"]
TIMEOUT = 600  # seconds; a busy machine takes several times what a quiet one does


def launch(results, *options, script="full_paper.py"):
    tiny = TINY if script == "full_paper.py" else ()
    command = [sys.executable, str(ROOT / "sweeps" / script), *tiny, "--results", str(results), *options]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def sweep(results, *options, script="full_paper.py"):
    process = launch(results, *options, script=script)
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def rows(results, table):
    """All rows of a table in a fixed order, without what differs between equal runs: wall time, and the commit."""
    found = open_results(results).read(table).to_pylist()
    return sorted(repr({k: v for k, v in row.items() if k not in ("seconds", "code_version")}) for row in found)


def assert_same_results(left, right):
    for table in SCHEMAS:
        ours, theirs = Counter(rows(left, table)), Counter(rows(right, table))
        assert ours == theirs, f"{table}: only left {list(ours - theirs)[:3]}, only right {list(theirs - ours)[:3]}"


def kill_outright(driver):
    """Kill a sweep that started Ray itself, and its workers with it: left alone they still write for seconds."""
    workers = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    driver.communicate()


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the sweep did not get that far"
        time.sleep(0.05)


def read_until(driver, text):
    """What a sweep prints until `text` is in it; the rest is left for `communicate`."""
    shown = b""
    while text.encode() not in shown:
        part = os.read(driver.stdout.fileno(), 4096)
        assert part, f"the sweep ended without {text!r}: {shown.decode()}"
        shown += part
    return shown.decode()


def finished_epochs(results):
    """The number of epochs each unfinished run could continue from."""
    storage = open_storage(results)
    names = [p.name for p in (Path(results) / "checkpoints").glob("*")] if Path(results).exists() else []
    counts = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # the run ended between looking and reading
            last = CheckpointFolder(storage, name).load_last()
            counts += [] if last is None else [len(last.facts["records"]) - 1]
    return counts


def written(results, *tables):
    """When each unit's file was written."""
    return {p: p.stat().st_mtime_ns for table in tables for p in Path(results, table).glob("*.parquet")}


def worker_processes(driver, name):
    """The Ray workers below the process `driver` that are at work on `name`, as Ray writes it into their titles."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended between listing and looking
            found += [process] if name in " ".join(process.cmdline()) else []
    return found
