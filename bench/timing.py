"""What every benchmark needs: ways timed in turn, the machine's matrix rate, and a place for the result."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def time_in_turn(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the seconds of each step, all ways in turn in every round, after one round of warm-up.

    With one thread on the CPU these are CPU seconds, which other processes disturb less than wall time.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
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


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return FLOP/s of a square matrix product on random data: the floor that FLOPs are held against."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(statistics.median(s) for s in time_in_turn({"x": lambda: a @ b}, 5, device).values())


def save(name: str, measured: Mapping[str, object], device: torch.device, **settings: object) -> None:
    """Keep what was measured in bench/results/NAME.json, with the machine, the versions and the date."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **settings,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**facts, **measured}, indent=2) + "\n")
