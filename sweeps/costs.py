"""What a sweep will cost: FLOPs, time and disk, estimated before anything is spent."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memlib.config import ModelConfig, RunConfig, build_config
from memlib.datasets import Dataset
from memlib.experiments import CriticalUnitsConfig, RetrainingConfig
from memlib.models import build_model
from memlib.results import ResultStore
from memlib.units import Task
from sweeps.cluster import Capacity
from sweeps.preflight import check_disk, dataset_key
from sweeps.progress import duration, run_label
from sweeps.wanted import ToDo

PASSES_PER_STEP = 5  # one forward, two backward at twice its cost each
PASSES_PER_PLAIN_STEP = 3  # without gradient accounting: one backward
PASSES_PER_RETRAINING_STEP = 2  # one forward, one backward through what lies behind the group
STEPS_OF_A_SEARCH = 5  # units removed until an example flips, on average (docs/results.md)
PASSES_OF_A_SEARCH = 2  # one forward, one backward to the gates
SHARE_BEHIND_A_GROUP = 0.55  # of a forward pass, on average over the groups of ResNet-9
SHARE_OF_MATRIX_RATE = 0.7  # what training reaches of a plain matrix product's rate (docs/performance.md)


@dataclass(frozen=True)
class RunCost:
    """FLOPs (2 a multiply-add) of training and per-epoch evaluation; bytes of the checkpoints kept."""

    flops: float
    checkpoint_bytes: int


@dataclass(frozen=True)
class Place:
    """Where a sweep happens: what computes, what keeps the results, and where it is told."""

    capacity: Capacity
    store: ResultStore
    console: Console


def describe_plan(
    to_do: ToDo, later: Mapping[RunConfig, Sequence[Task]], datasets: Mapping[str, Dataset], place: Place
) -> None:
    """Print what is to do with its FLOPs, and the estimated time and disk of all.

    later: the tasks that follow each run. datasets: by `dataset_key`.

    Raises:
        InputError: the results' disk has no room for it.
    """
    capacity, console = place.capacity, place.console
    costs = {run: run_cost(run, datasets[dataset_key(run)]) for run in to_do.runs}
    for run in to_do.runs:
        console.print(f"  {run.run_id}  {run_label(run)}: {costs[run].flops / 1e12:.3g} TFLOP")
    tasks = [*to_do.tasks, *(task for run in to_do.runs for task in later[run])]
    task_costs = [task_cost(task, datasets[dataset_key(task.run)]) for task in tasks]
    for experiment in dict.fromkeys(task.experiment for task in tasks):
        chosen = [(t, c) for t, c in zip(tasks, task_costs, strict=True) if t.experiment == experiment]
        n_units = sum(len(task.units) for task, _ in chosen)
        console.print(
            f"  {experiment}: {n_units} units in {len(chosen)} tasks, at most "
            f"{sum(cost.flops for _, cost in chosen) / 1e12:.3g} TFLOP"
        )
    n_bytes = sum(cost.checkpoint_bytes for cost in costs.values())
    estimate = _estimate_time(list(costs.values()), task_costs, capacity)
    console.print(f"on {capacity}: {estimate}, {n_bytes / 1e6:.0f} MB of checkpoints")
    check_disk(place.store, n_bytes)


def run_cost(config: RunConfig, dataset: Dataset) -> RunCost:
    """Return the estimated cost of one run; the network is only built, nothing is computed."""
    n_train = min(config.data.limit or len(dataset.train), len(dataset.train))
    model = _build(config, dataset)
    n_bytes = sum(t.nbytes for t in model.state_dict().values())
    forward = _image_flops(config, dataset)
    evaluated = n_train + len(dataset.test)
    per_step = PASSES_PER_STEP if config.training.gradient_accounting else PASSES_PER_PLAIN_STEP
    n_evaluations = len(config.training.evaluated_epochs) + 1  # + 1: the examples after training
    flops = forward * (config.training.epochs * per_step * n_train + n_evaluations * evaluated)
    return RunCost(flops, n_bytes * (len(config.checkpoint_epochs) + 4))  # + 4: the state to continue from, twice


def task_cost(task: Task, dataset: Dataset) -> RunCost:
    """Return the estimated cost of a task; an upper bound for retraining, which may stop early."""
    n_train = min(task.run.data.limit or len(dataset.train), len(dataset.train))
    n_noisy = int(task.run.noise.fraction * n_train)
    sizes = {"clean": n_train - n_noisy, "noisy": n_noisy, "test": len(dataset.test)}
    settings = task.units[0].settings
    limit = settings.get("limit") or max(sizes.values())
    evaluated = sum(min(limit, n) for n in sizes.values())
    n_passes = len(task.units) * evaluated
    if task.experiment == "critical_units":
        config = build_config(CriticalUnitsConfig, {k: v for k, v in settings.items() if k not in ("kind", "part")})
        judged = min(config.limit or n_train, n_train)
        searched = STEPS_OF_A_SEARCH * PASSES_OF_A_SEARCH * config.reference_size * config.reference_copies
        n_passes = config.part_size * (searched / config.refresh + SHARE_BEHIND_A_GROUP * judged)
        return RunCost(n_passes * _image_flops(task.run, dataset), 0)
    if task.experiment == "cross_validation":
        held_out = n_train / settings["folds"]
        n_passes = settings["epochs"] * PASSES_PER_PLAIN_STEP * (n_train - held_out) + 2 * n_train + held_out
        return RunCost(n_passes * _image_flops(task.run, dataset), 0)
    if task.experiment == "retraining":
        epochs = settings.get("epochs", RetrainingConfig().epochs)
        n_passes = epochs * (evaluated + PASSES_PER_RETRAINING_STEP * sizes[settings["trained_on"]])
    return RunCost(SHARE_BEHIND_A_GROUP * n_passes * _image_flops(task.run, dataset), 0)


def sweep_seconds(runs: Sequence[RunCost], tasks: Sequence[RunCost] = (), *, lanes: int, rate: float) -> float:
    """Return the estimated wall time of runs, then tasks, on `lanes` threads or cards of `rate` FLOP/s each.

    A run takes its equal share of the lanes and cannot be split further, so the longest is a lower bound.
    """
    effective = rate * SHARE_OF_MATRIX_RATE
    longest = max((cost.flops for cost in runs), default=0.0) / (effective * max(1, lanes // max(1, len(runs))))
    trained = max(longest, sum(cost.flops for cost in runs) / (effective * lanes))
    return trained + sum(cost.flops for cost in tasks) / (effective * lanes)


def _estimate_time(runs: Sequence[RunCost], tasks: Sequence[RunCost], capacity: Capacity) -> str:
    device = torch.device("cuda" if capacity.gpus else "cpu")
    if capacity.gpus and not torch.cuda.is_available():
        return "time not estimated (this process has no GPU to measure)"
    lanes = capacity.gpus or capacity.cpus
    return f"about {duration(sweep_seconds(runs, tasks, lanes=lanes, rate=measure_matrix_rate(device)))}"


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


def _build(config: RunConfig, dataset: Dataset) -> nn.Module:
    return build_model(config.model, image_shape=dataset.image_shape, num_classes=dataset.num_classes, seed=0)


def _image_flops(config: RunConfig, dataset: Dataset) -> int:
    return _cached_flops(config.model, dataset.image_shape, dataset.num_classes)


@functools.lru_cache
def _cached_flops(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> int:
    model = build_model(config, image_shape=image_shape, num_classes=num_classes, seed=0)
    return forward_flops(model, image_shape)


def forward_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the FLOPs (2 a multiply-add) of one image's forward pass, counted without computing it."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, *image_shape, device="meta"))
    return counter.get_total_flops()
