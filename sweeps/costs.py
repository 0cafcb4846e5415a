"""What a sweep will cost: FLOPs, time and disk, estimated before anything is spent."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memlib.config import ModelConfig, RunConfig
from memlib.datasets import Dataset
from memlib.dropout_modes import variants_of
from memlib.experiments import RetrainingConfig
from memlib.models import build_model
from memlib.neuron_units import search_settings
from memlib.results import ResultStore
from memlib.runs import build_network
from memlib.units import Task
from sweeps.cluster import Capacity
from sweeps.estimates import Rates, RunCost, Work, sweep_seconds
from sweeps.preflight import check_disk, dataset_key
from sweeps.progress import duration, run_label
from sweeps.resources import trial_resources
from sweeps.throughput import PASSES_PER_PLAIN_STEP, PASSES_PER_STEP, Throughput, measure_throughput, measured_elsewhere
from sweeps.wanted import ToDo

PASSES_PER_RETRAINING_STEP = 2  # one forward, one backward through what lies behind the group
STEPS_OF_A_SEARCH = 5  # units removed until an example flips, on average (docs/results.md)
PASSES_OF_A_SEARCH = 2  # one forward, one backward to the gates
SHARE_BEHIND_A_GROUP = 0.55  # of a forward pass, on average over the groups of ResNet-9


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
    work = Work(costs, [(task.run, cost) for task, cost in zip(tasks, task_costs, strict=True)])
    (estimate,) = estimate_times([work], datasets, capacity)
    at_once = _at_once(to_do.runs, capacity)
    console.print(f"on {capacity}: {estimate}, {at_once} runs at once, {n_bytes / 1e6:.0f} MB of checkpoints")
    for line in _elsewhere(work):
        console.print(line)
    check_disk(place.store, n_bytes)


def run_cost(config: RunConfig, dataset: Dataset) -> RunCost:
    """Return the estimated cost of one run; the network is only built, nothing is computed."""
    n_train = train_size(config, dataset)
    model = build_network(config, dataset)
    n_bytes = sum(t.nbytes for t in model.state_dict().values())
    forward = image_flops(config, dataset)
    n_test = len(dataset.test)
    per_step = PASSES_PER_STEP if config.training.gradient_accounting else PASSES_PER_PLAIN_STEP
    in_training = forward * config.training.epochs * per_step * n_train
    evaluated = len(config.training.evaluated_epochs) * (n_train + n_test)
    evaluated += _predicted_at_the_end(model, n_train, n_test)
    kept = len(config.checkpoint_epochs) + 4  # + 4: the state to continue from, twice
    return RunCost(in_training + forward * evaluated, n_bytes * kept, in_training)


def _predicted_at_the_end(model: nn.Module, n_train: int, n_test: int) -> int:
    """Return how many forward passes give the predictions after training: with example-tied dropout, in every mode."""
    ways = variants_of(model)
    recalibrated = sum(way.batchnorm == "recalibrated" for way in ways)
    with_test = sum(way.mode != "tied" for way in ways)
    return (len(ways) + recalibrated) * n_train + with_test * n_test


def train_size(config: RunConfig, dataset: Dataset) -> int:
    """Return how many images a run trains on."""
    n = min(config.data.limit or len(dataset.train), len(dataset.train))
    return n - int((config.data.holdout or 0) * n)


def task_cost(task: Task, dataset: Dataset) -> RunCost:
    """Return the estimated cost of a task; an upper bound for retraining, which may stop early."""
    n_train = train_size(task.run, dataset)
    n_noisy = int(task.run.noise.fraction * n_train)
    sizes = {"clean": n_train - n_noisy, "noisy": n_noisy, "test": len(dataset.test)}
    settings = task.units[0].settings
    limit = settings.get("limit") or max(sizes.values())
    evaluated = sum(min(limit, n) for n in sizes.values())
    n_passes = len(task.units) * evaluated
    if task.experiment == "critical_units":
        config = search_settings(settings)
        judged = min(config.limit or n_train, n_train)
        searched = STEPS_OF_A_SEARCH * PASSES_OF_A_SEARCH * config.reference_size * config.reference_copies
        n_passes = config.part_size * (searched / config.refresh + SHARE_BEHIND_A_GROUP * judged)
        return RunCost(n_passes * image_flops(task.run, dataset), 0)
    if task.experiment == "cross_validation":
        held_out = n_train / settings["folds"]
        trained = settings["epochs"] * PASSES_PER_PLAIN_STEP * (n_train - held_out)
        forward = image_flops(task.run, dataset)
        return RunCost((trained + 2 * n_train + held_out) * forward, 0, trained * forward)
    if task.experiment == "retraining":
        epochs = settings.get("epochs", RetrainingConfig().epochs)
        n_passes = epochs * (evaluated + PASSES_PER_RETRAINING_STEP * sizes[settings["trained_on"]])
    return RunCost(SHARE_BEHIND_A_GROUP * n_passes * image_flops(task.run, dataset), 0)


def _at_once(runs: Sequence[RunConfig], capacity: Capacity) -> int:
    """Return how many of the runs the cluster has room for at once, if all ask for as much as the largest."""
    if not runs:
        return 0
    wanted = [trial_resources(run, capacity, n_runs=len(runs)) for run in runs]
    room = capacity.cpus // max(w.cpus for w in wanted)
    share = max(w.gpu for w in wanted)
    return min(len(runs), room, int(capacity.gpus / share) if share else room)


def estimate_times(works: Sequence[Work], datasets: Mapping[str, Dataset], capacity: Capacity) -> list[str]:
    """Return the estimated wall time of each in words; a few training steps of each kind of run are timed for it.

    They are timed on the threads a run will have, or on those of this machine, with each of the others as good.
    """
    device = torch.device("cuda" if capacity.gpus else "cpu")
    if capacity.gpus and not torch.cuda.is_available():
        return ["time not estimated (this process has no GPU to measure)"] * len(works)
    alike: dict[tuple[object, ...], Throughput] = {}

    def measured(run: RunConfig, threads: int) -> Throughput:
        key = (run.model, run.dropout, run.training.batch_size, run.training.precision, dataset_key(run), threads)
        if key not in alike:
            dataset = datasets[dataset_key(run)]
            here = min(threads, _usable_cpus())  # a worker may have more of them: those count as much
            found = measure_throughput(run, dataset, image_flops(run, dataset), device, threads=here)
            alike[key] = Throughput(found.training * threads / here, found.evaluation * threads / here)
        return alike[key]

    lanes = capacity.gpus or capacity.cpus
    texts = []
    for work in works:
        granted = [trial_resources(run, capacity, n_runs=len(work.runs)).cpus for run in work.runs]
        threads = 1 if capacity.gpus else max(granted, default=1)
        rates = Rates(
            {run: measured(run, threads) for run in work.runs}, {run: measured(run, 1) for run, _ in work.tasks}
        )
        texts.append(f"about {duration(sweep_seconds(work, rates, lanes=lanes))}")
    return texts


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _elsewhere(work: Work) -> Iterator[str]:
    """Yield a line for each kind of device that was measured elsewhere with every model of the sweep."""
    runs = {*work.runs, *(run for run, _ in work.tasks)}
    for device, by_model in measured_elsewhere().items():
        if all(run.model.name in by_model for run in runs):
            rates = {run: by_model[run.model.name] for run in runs}
            seconds = sweep_seconds(work, Rates(rates, rates), lanes=1)
            yield f"on one {device}, as measured there: about {duration(seconds)}"


def image_flops(config: RunConfig, dataset: Dataset) -> int:
    """Return the FLOPs (2 a multiply-add) of one image's forward pass."""
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
