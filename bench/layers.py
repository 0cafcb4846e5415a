"""Rewinding and retraining of every layer group of ResNet-9 at full width, against the whole network each time.

In turn in one process. Rewinding, 10 epochs x 9 groups: (a) ours; (b) one full evaluation for each
(group, epoch), float32, contiguous; (c) ours on the same layout as (b): what sharing prefixes alone
gives; (d) ours in bfloat16. Retraining, all epochs of each group with their evaluations: (e) ours, on
the kept outputs of the frozen prefix; (f) the whole network in every step. Both ways must agree.
Part `ray` times the rewinding units as Ray tasks on 2 CPUs against one process on 1 thread.
`--save` keeps the rows in bench/results/layers_PART.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from rich.console import Console
from timing import matrix_rate, save, time_in_turn
from torch import Tensor, nn

from memlib.batches import normalize, split_order, steps_per_epoch
from memlib.checkpoints import CheckpointFolder
from memlib.config import ModelConfig, Precision, RunConfig, build_config
from memlib.datasets import Dataset, ImageSet
from memlib.experiments import ExperimentsConfig, RetrainingConfig, RewindingConfig
from memlib.grouping import layer_groups
from memlib.models import build_model
from memlib.prefixes import State
from memlib.results import ResultStore, create_results
from memlib.retraining import Retraining, retrain
from memlib.rewinding import CHUNK_SIZE, Examples, Measurement, rewind, rewinding_accuracies
from memlib.schedules import learning_rate
from memlib.seeds import stream
from memlib.tasks import perform_task, plan_tasks
from memlib.units import Task
from sweeps.costs import forward_flops
from sweeps.preflight import dataset_key
from sweeps.progress import SweepProgress

SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
N_EPOCHS = 10
PARTS = ("rewinding", "retraining", "ray")


def network(seed: int, device: torch.device) -> nn.Module:
    """Return a full-width ResNet-9 in evaluation mode."""
    return build_model(ModelConfig(), image_shape=SHAPE, num_classes=10, seed=seed).to(device).eval()


def random_examples(n: int, device: torch.device) -> Examples:
    """Return uint8 images as large as CIFAR-10's and labels; values do not matter for time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=generator)
    return images.to(device), torch.randint(0, 10, (n,), generator=generator).to(device)


def rewind_ours(model: nn.Module, states: Mapping[int, State], examples: Examples, precision: Precision) -> list[float]:
    """Return the accuracies in order of group and epoch, prefixes shared."""
    how = Measurement(precision=precision)
    return [r.accuracy for r in rewinding_accuracies(model, states, {"test": examples}, measurement=how)]


@torch.no_grad()
def rewind_obvious(model: nn.Module, states: Mapping[int, State], examples: Examples) -> list[float]:
    """Return the same accuracies from one full evaluation of a copied model for each group and epoch."""
    found = []
    for group in layer_groups(model).names:
        for state in states.values():
            rewound = rewind(model, state, [group])
            chunks = zip(examples[0].split(CHUNK_SIZE), examples[1].split(CHUNK_SIZE), strict=True)
            n_right = sum(int((rewound(_contiguous(i)).argmax(1) == labels).sum()) for i, labels in chunks)
            found.append(n_right / len(examples[1]))
    return found


def retrain_ours(model: nn.Module, state: State, examples: Examples, config: RetrainingConfig) -> list[float]:
    """Return the accuracies after each epoch of retraining each group, on kept prefix outputs."""
    how, groups = Retraining(config=config), layer_groups(model).names
    curves = [retrain(model, state, [group], examples, {"clean": examples}, how=how).curve for group in groups]
    return [point.accuracy for curve in curves for point in curve]


def retrain_obvious(model: nn.Module, state: State, examples: Examples, config: RetrainingConfig) -> list[float]:
    """Return the same accuracies from a whole network that runs in every step and evaluation."""
    found = []
    for group in layer_groups(model).names:
        reset = rewind(model, state, [group], buffers=True)
        found += _retrain_group(reset, group, examples, config)
    return found


def _retrain_group(model: nn.Module, group: str, examples: Examples, config: RetrainingConfig) -> list[float]:
    learning = set(layer_groups(model).parameters[group])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        chosen, lr=config.peak_lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    images, labels = examples
    per_epoch = steps_per_epoch(len(labels), config.batch_size)
    found = [_accuracy(model.eval(), examples)]
    for epoch in range(1, config.epochs + 1):
        model.get_submodule(group).train()
        order = torch.randperm(len(labels), generator=stream(0, "retraining_order", epoch))
        for index, batch in enumerate(split_order(order, config.batch_size)):
            step = (epoch - 1) * per_epoch + index
            optimizer.param_groups[0]["lr"] = learning_rate(config, step=step, steps=config.epochs * per_epoch)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(normalize(images[batch])), labels[batch]).backward()
            optimizer.step()
        found.append(_accuracy(model.eval(), examples))
    return found


@torch.no_grad()
def _accuracy(model: nn.Module, examples: Examples) -> float:
    chunks = zip(examples[0].split(CHUNK_SIZE), examples[1].split(CHUNK_SIZE), strict=True)
    n_right = sum(int((model(normalize(images)).argmax(1) == labels).sum()) for images, labels in chunks)
    return n_right / len(examples[1])


def _contiguous(images: Tensor) -> Tensor:
    return normalize(images).contiguous()


def measure_rewinding(n: int, rounds: int, device: torch.device) -> list[dict[str, object]]:
    """Return the medians and ratios of all ways to rewind, on `n` images."""
    model = network(0, device)
    states = {epoch: network(epoch + 1, device).state_dict() for epoch in range(N_EPOCHS)}
    examples = random_examples(n, device)
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    contiguous = copy.deepcopy(model)
    contiguous.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(),))
    steps: dict[str, Callable[[], list[float]]] = {
        "(a) ours": partial(rewind_ours, fast, states, examples, "float32"),
        "(b) one full evaluation each": partial(rewind_obvious, model, states, examples),
        "(c) ours, layout of (b)": partial(rewind_ours, contiguous, states, examples, "float32"),
        "(d) ours, bfloat16": partial(rewind_ours, fast, states, examples, "bfloat16"),
    }
    agreement = [abs(x - y) for x, y in zip(steps["(a) ours"](), rewind_obvious(model, states, examples), strict=True)]
    print(f"largest difference between (a) and (b): {max(agreement):.4f} of {n} images")
    return _rows(time_in_turn(steps, rounds, device, warm_up=False), reference="(b) one full evaluation each")


def measure_retraining(n: int, rounds: int, epochs: int, device: torch.device) -> list[dict[str, object]]:
    """Return the medians and ratios of both ways to retrain all groups for some epochs, on `n` images."""
    model = network(0, device).to(memory_format=torch.channels_last)
    state, examples = network(1, device).state_dict(), random_examples(n, device)
    # Patience as long as the training: both ways take all epochs, whatever they reach.
    config = RetrainingConfig(epochs=epochs, batch_size=min(128, n // 2), patience=epochs)
    curves: dict[str, list[float]] = {}

    def ours() -> None:
        curves["ours"] = retrain_ours(model, state, examples, config)

    def obvious() -> None:
        curves["obvious"] = retrain_obvious(model, state, examples, config)

    seconds = time_in_turn({"(e) ours": ours, "(f) whole network": obvious}, rounds, device, warm_up=False)
    differences = [abs(x - y) for x, y in zip(curves["ours"], curves["obvious"], strict=True)]
    print(f"largest difference between (e) and (f) after any epoch: {max(differences):.4f} of {n} images")
    return _rows(seconds, reference="(f) whole network")


def measure_ray(n: int) -> list[dict[str, object]]:
    """Return the time of a run's rewinding units in one process on 1 thread, and as Ray tasks on 2 CPUs."""
    settings = {"data": {"name": "mnist"}, "training": {"batch_size": 2}}  # neither is used
    run = build_config(RunConfig, {**settings, "checkpoints": {"epochs": list(range(N_EPOCHS))}})
    images, labels = random_examples(n, torch.device("cpu"))
    examples = ImageSet(images, labels, torch.arange(n))
    dataset = Dataset("mnist", examples, examples, tuple("0123456789"))
    tasks = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig()), layer_groups(network(0, CPU)).names)
    seconds = {}
    for way, perform in (("one process, 1 thread", perform_here), ("Ray tasks on 2 CPUs", perform_on_ray)):
        with tempfile.TemporaryDirectory() as folder:
            store = create_results(folder)
            for epoch in run.checkpoint_epochs:
                CheckpointFolder(store.storage, run.run_id).save_epoch(epoch, network(epoch, CPU), {})
            seconds[way] = [perform(tasks, dataset, store)]
    return _rows(seconds, reference="one process, 1 thread")


def perform_here(tasks: Sequence[Task], dataset: Dataset, store: ResultStore) -> float:
    """Return the seconds the tasks take one after the other on 1 thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    for task in tasks:
        perform_task(task, dataset, store, device=CPU)
    torch.set_num_threads(threads)
    return time.perf_counter() - started


def perform_on_ray(tasks: Sequence[Task], dataset: Dataset, store: ResultStore) -> float:
    """Return the seconds the tasks take on Ray, its start left out and that of its workers counted in."""
    from sweeps.cluster import start_ray, stop_ray  # noqa: PLC0415 - Ray only where it is asked for

    capacity = start_ray(None)
    from sweeps.object_store import put_images  # noqa: PLC0415
    from sweeps.unit_tasks import TaskPool  # noqa: PLC0415

    started = time.perf_counter()
    images = put_images({dataset_key(tasks[0].run): dataset})
    pool = TaskPool(images, store.storage.root, capacity, SweepProgress([], Console(quiet=True)))
    pool.add(tasks)
    pool.finish()
    seconds = time.perf_counter() - started
    stop_ray()
    if pool.failures:
        raise SystemExit(pool.failures[0].error)
    return seconds


def _rows(seconds: Mapping[str, list[float]], *, reference: str) -> list[dict[str, object]]:
    base = statistics.median(seconds[reference])
    rows = []
    for way, times in seconds.items():
        median = statistics.median(times)
        rows.append({"way": way, "seconds": median, "times_as_fast": base / median})
        print(f"{way:32} {median:8.1f} s, {base / median:.2f} times as fast as {reference}")
    return rows


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description="Time rewinding and retraining against the whole network each time.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--images", type=int, default=500, help="time is linear in them; the issue's 5,000 take long")
    parser.add_argument("--epochs", type=int, default=10, help="of retraining")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1: CPU seconds, but for ray")
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/layers_PART.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure = {
        "rewinding": partial(measure_rewinding, options.images, options.rounds, device),
        "retraining": partial(measure_retraining, options.images, options.rounds, options.epochs, device),
        "ray": partial(measure_ray, options.images),
    }
    for part in options.parts:
        rows = measure[part]()
        if options.save:
            facts = {"images": options.images, "forward_flops": forward_flops(network(0, CPU), SHAPE)}
            facts["float32_matrix_rate"] = matrix_rate(torch.float32, device)
            save(f"layers_{part}", {"rows": rows}, device, **facts)


if __name__ == "__main__":
    main()
