"""What every benchmark needs: ways timed in turn, the machine's own rates, and a place for the result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from memlib.code_version import code_version

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far beyond the caches, and long beside a launch
LARGEST_MATRIX = {"cpu": 2048, "cuda": 16_384}
LONG_ENOUGH = 0.05  # seconds of one matrix product


def time_in_turn(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the seconds of each step, all ways in turn in every round, after one round of warm-up.

    With one thread on the CPU these are CPU seconds, which other processes disturb less than wall time.
    """
    clock = time.process_time if counts_cpu_seconds(device) else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + warm_up):
        for name, step in steps.items():
            started = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def counts_cpu_seconds(device: torch.device) -> bool:
    """Return whether `time_in_turn` counts CPU seconds: with one thread on the CPU."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def rows_of(seconds: Mapping[str, list[float]], *, reference: str) -> list[dict[str, object]]:
    """Return and print a row a way: its median seconds, and how many times as fast as `reference` it is.

    The ratio is the median over rounds of the ratios within a round, so what slows a whole round down cancels.
    """
    rows: list[dict[str, object]] = []
    for way, times in seconds.items():
        ratio = statistics.median(r / t for r, t in zip(seconds[reference], times, strict=True))
        rows.append({"way": way, "seconds": statistics.median(times), "times_as_fast": ratio})
        print(f"{way:44} {statistics.median(times):10.4f} s, {ratio:6.2f} times as fast as {reference}", flush=True)
    return rows


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return FLOP/s of a square matrix product on random data: the floor that FLOPs are held against.

    Of the largest matrices whose product takes no longer than it needs to be timed: a CPU without instructions for
    `dtype` is hundreds of times slower than one that has them.
    """
    n, largest = 256, LARGEST_MATRIX[device.type]
    while (seconds := _product_seconds(n, dtype, device)) < LONG_ENOUGH and n < largest:
        n *= 2
    return 2 * n**3 / seconds


def _product_seconds(n: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return statistics.median(time_in_turn({"x": lambda: a @ b}, 5, device)["x"])


def matrix_rates(device: torch.device) -> dict[str, float]:
    """Return `matrix_rate` by the name of each precision training can have."""
    return {name: matrix_rate(dtype, device) for name, dtype in DTYPES.items()}


def bandwidth(device: torch.device) -> float:
    """Return bytes/s of copying memory, read and written bytes both counted."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (times,) = time_in_turn({"x": lambda: target.copy_(source)}, 5, device).values()
    return 2 * source.nbytes / statistics.median(times)


def machine(device: torch.device) -> dict[str, object]:
    """Return what a measurement depends on besides the code, and the code's version."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "date": datetime.date.today().isoformat(),
        "code_version": code_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu_model": str(capabilities.get("cpu_name") or platform.processor() or platform.machine()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU seconds" if counts_cpu_seconds(device) else "wall seconds",
    }


def save(name: str, measured: Mapping[str, object], device: torch.device, **settings: object) -> Path:
    """Keep what was measured in bench/results/NAME.json, with the machine, the versions and the date; return where."""
    return save_to(RESULTS, name, {**machine(device), **settings, **measured})


def save_to(folder: Path, name: str, content: Mapping[str, object]) -> Path:
    """Write `content` to FOLDER/NAME.json, whole or not at all, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.json", folder / f".{name}.json.part"
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
    return path
