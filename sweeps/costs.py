"""What a sweep will cost: FLOPs, time and disk, estimated before anything is spent."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memlib.config import RunConfig
from memlib.datasets import Dataset
from memlib.models import build_model
from memlib.results import ResultStore
from sweeps.cluster import Capacity
from sweeps.preflight import check_disk, dataset_key
from sweeps.progress import duration, run_label

PASSES_PER_STEP = 5  # one forward, two backward at twice its cost each
SHARE_OF_MATRIX_RATE = 0.7  # what training reaches of a plain matrix product's rate (docs/performance.md)


@dataclass(frozen=True)
class RunCost:
    """FLOPs (2 a multiply-add) of training and per-epoch evaluation; bytes of the checkpoints kept."""

    flops: float
    checkpoint_bytes: int


def describe_plan(
    runs: Sequence[RunConfig], datasets: Mapping[str, Dataset], capacity: Capacity, store: ResultStore, console: Console
) -> None:
    """Print the runs with their FLOPs, and the estimated time and disk of all.

    Raises:
        InputError: the results' disk has no room for it.
    """
    costs = {run.run_id: run_cost(run, datasets[dataset_key(run)]) for run in runs}
    for run in runs:
        console.print(f"  {run.run_id}  {run_label(run)}: {costs[run.run_id].flops / 1e12:.3g} TFLOP")
    n_bytes = sum(cost.checkpoint_bytes for cost in costs.values())
    console.print(
        f"on {capacity.cpus} CPUs and {capacity.gpus} GPUs: {_estimate_time(list(costs.values()), capacity)}, "
        f"{n_bytes / 1e6:.0f} MB of checkpoints"
    )
    check_disk(store, n_bytes)


def run_cost(config: RunConfig, dataset: Dataset) -> RunCost:
    """Return the estimated cost of one run; the network is only built, nothing is computed."""
    n_train = min(config.data.limit or len(dataset.train), len(dataset.train))
    model = build_model(config.model, image_shape=dataset.image_shape, num_classes=dataset.num_classes, seed=0)
    n_bytes = sum(t.nbytes for t in model.state_dict().values())
    forward = forward_flops(model, dataset.image_shape)
    evaluated = n_train + len(dataset.test)
    flops = forward * (config.training.epochs * (PASSES_PER_STEP * n_train + evaluated) + 2 * evaluated)
    return RunCost(flops, n_bytes * (len(config.checkpoint_epochs) + 4))  # + 4: the state to continue from, twice


def sweep_seconds(costs: Sequence[RunCost], *, lanes: int, rate: float) -> float:
    """Return the estimated wall time of runs on `lanes` threads or cards of `rate` FLOP/s each.

    A run takes its equal share of the lanes and cannot be split further, so the longest is a lower bound.
    """
    effective = rate * SHARE_OF_MATRIX_RATE
    longest = max(cost.flops for cost in costs) / (effective * max(1, lanes // len(costs)))
    return max(longest, sum(cost.flops for cost in costs) / (effective * lanes))


def _estimate_time(costs: Sequence[RunCost], capacity: Capacity) -> str:
    device = torch.device("cuda" if capacity.gpus else "cpu")
    if capacity.gpus and not torch.cuda.is_available():
        return "time not estimated (this process has no GPU to measure)"
    lanes = capacity.gpus or capacity.cpus
    return f"about {duration(sweep_seconds(costs, lanes=lanes, rate=measure_matrix_rate(device)))}"


def measure_matrix_rate(device: torch.device) -> float:
    """Return this machine's FLOP/s on a float32 matrix product with one thread (or the GPU), measured in a moment."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [_time_product(a) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / min(times)


def _time_product(a: torch.Tensor) -> float:
    started = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return time.perf_counter() - started


def forward_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the FLOPs (2 a multiply-add) of one image's forward pass, counted without computing it."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, *image_shape, device="meta"))
    return counter.get_total_flops()
