"""How long work takes here: a few real training steps and forward passes of a run's own network, timed.

For devices that are not here, what `bench/gpu.py` measured on them (bench/results/gpu_rates*.json).
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memlib.batches import normalize
from memlib.config import RunConfig
from memlib.datasets import Dataset
from memlib.evaluation import predict
from memlib.example_tied_dropout import dropout_layers, set_mode
from memlib.gradient_accounting import add_to_sums_, zero_sums
from memlib.precision import resolve_precision
from memlib.runs import build_network
from memlib.seeds import global_stream
from memlib.training import training_step
from memlib.training_state import TrainingState

STEP_SECONDS = 0.75  # of a timed step on a CPU, about and at most, unless two images take longer
FIRST_IMAGES = 2  # BatchNorm needs as many
ROUNDS = 3
PASSES_PER_STEP = 5  # one forward, two backward at twice its cost each
PASSES_PER_PLAIN_STEP = 3  # without gradient accounting: one backward
MEASURED = Path(__file__).parents[1] / "bench" / "results"  # in a clone of the repository


@dataclass(frozen=True)
class Throughput:
    """FLOP/s of a network on some threads or a card: in training steps, and in float32 forward passes."""

    training: float
    evaluation: float


def measure_throughput(
    config: RunConfig, dataset: Dataset, image_flops: int, device: torch.device, *, threads: int = 1
) -> Throughput:
    """Return the throughput of the run's network on so many threads of this CPU, or on this machine's card.

    image_flops: of one image's forward pass. A CPU takes smaller batches than the run's where those take long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with global_stream(config.seed, "throughput", device=device):  # dropout draws from it
            return _measure(config, dataset, image_flops, device)
    finally:
        torch.set_num_threads(before)


def measured_elsewhere(folder: Path = MEASURED) -> dict[str, dict[str, Throughput]]:
    """Return by device, then by model's name, the throughput that `bench/gpu.py` kept in `folder`."""
    found: dict[str, dict[str, Throughput]] = {}
    for path in sorted(folder.glob("gpu_rates*.json")):
        content = json.loads(path.read_text())
        if not content["tiny"]:
            found[content["device"]] = _by_model(content["rows"])
    return found


def _by_model(rows: list[Mapping[str, object]]) -> dict[str, Throughput]:
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        kind = str(row["work"]).split(" by ")[0]  # evaluation is there by batch size; the best one counts
        of_model = rates.setdefault(str(row["model"]), {})
        of_model[kind] = max(of_model.get(kind, 0.0), float(str(row["flops_per_second"])))
    return {name: Throughput(r["training with accounting"], r["evaluation"]) for name, r in rates.items()}


def _measure(config: RunConfig, dataset: Dataset, image_flops: int, device: torch.device) -> Throughput:
    model = build_network(config, dataset).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4, fused=True)
    state = TrainingState(model.train(), optimizer, resolve_precision(config.training.precision, device))
    sums = zero_sums(list(model.parameters()))
    with_masks = bool(dropout_layers(model))

    def step(images: Tensor, labels: Tensor, ids: Tensor) -> None:
        batch = (normalize(images), labels, labels == 0)
        add_to_sums_(sums, training_step(state, batch, device=device, ids=ids if with_masks else None)[1])

    def some(n: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = dataset.train.take(torch.arange(n))
        return chosen.images.to(device), chosen.labels.to(device), chosen.ids.to(device)

    n = min(config.training.batch_size, len(dataset.train))
    if device.type == "cpu":
        n = _affordable(n, lambda m: _seconds(functools.partial(step, *some(m)), device, rounds=1))
    images, labels, ids = some(n)
    trained = PASSES_PER_STEP * image_flops * n / _seconds(lambda: step(images, labels, ids), device)
    if with_masks:
        set_mode(model, "scaled")  # the mode that takes any example
    evaluated = image_flops * n / _seconds(lambda: predict(model, images, labels, device=device), device)
    return Throughput(trained, evaluated)


def _affordable(n: int, seconds_on: Callable[[int], float]) -> int:
    """Return how many images, at most n, a step can take in the time a timed step may take."""
    images = FIRST_IMAGES
    while images < n and seconds_on(images) < STEP_SECONDS / 2:
        images *= 2
    return min(images, n)


def _seconds(work: Callable[[], object], device: torch.device, *, rounds: int = ROUNDS) -> float:
    """Return the median wall time of a few rounds after one of warm-up: what other work here slows down counts."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
