"""What example-tied dropout costs in training and saves in deployment, on ResNet-9.

In turn in one process: (a) a training step of the network without dropout; (b) the same step with
example-tied dropout in its six places; (c) the six layers alone, one forward and two backward passes
on activations of their shapes, which is what (b) adds and is less noisy than their difference. Then
the memory of a forward pass at ids below 10^4 and below 10^9, beside the released code's masks, and
the deployed network in turn: (d) without dropout, (e) in mode `dropped`, (f) pruned. `--save` keeps
the rows in bench/results/example_tied_dropout.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timing import save, time_in_turn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memlib.config import ModelConfig
from memlib.example_tied_dropout import dropout_layers, dropout_mode, tie
from memlib.models import build_model
from memlib.precision import autocast, resolve_precision
from memlib.pruning import model_size, prune
from memlib.training import training_step
from memlib.training_state import TrainingState

SHAPE = (3, 32, 32)
NUMBERS_OF_EXAMPLES = (10**4, 10**9)


def network(device: torch.device, width: float) -> nn.Module:
    """Return a fresh ResNet-9."""
    model = build_model(ModelConfig(width=width), image_shape=SHAPE, num_classes=10, seed=0)
    return model.to(device).to(memory_format=torch.channels_last)


def batch_of(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, labels, is_noisy (a tenth) and ids."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(size, *SHAPE, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,), generator=generator)
    is_noisy = torch.rand(size, generator=generator) < 0.1
    ids = torch.randint(0, NUMBERS_OF_EXAMPLES[0], (size,), generator=generator)
    return inputs.to(device), labels.to(device), is_noisy.to(device), ids.to(device)


def step_of(model: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> Callable[[], object]:
    """Return a training step with gradient accounting."""
    inputs, labels, is_noisy, ids = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    state = TrainingState(model.train(), optimizer, resolve_precision("auto", device))
    given = ids if dropout_layers(model) else None
    return lambda: training_step(state, (inputs, labels, is_noisy), device=device, ids=given)


def layers_alone(tied: nn.Module, batch: tuple[Tensor, ...], device: torch.device) -> Callable[[], object]:
    """Return the layers' own work in a step: forward once and backward twice, on inputs of their shapes and types."""
    layers, seen, ids = dropout_layers(tied), [], batch[3]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach())) for layer in layers]
    with autocast("auto", device), torch.no_grad():
        tied(batch[0], ids=ids)
    for hook in hooks:
        hook.remove()
    inputs = [x.requires_grad_() for x in seen]
    gradients = [torch.ones_like(x) for x in inputs]

    def work() -> None:
        for layer, x, gradient in zip(layers, inputs, gradients, strict=True):
            y = layer(x, ids)
            torch.autograd.grad(y, x, gradient, retain_graph=True)
            torch.autograd.grad(y, x, gradient)

    return work


class AllocatedBytes(TorchDispatchMode):
    """Adds up the bytes of every tensor an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Run the operation and count what it gives."""
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        self.total += sum(t.nbytes for t in outputs if isinstance(t, Tensor))
        return result


def layer_bytes(tied: nn.Module, batch: tuple[Tensor, ...], n_examples: int) -> dict[str, float]:
    """Return what a forward pass makes and the model holds when ids reach up to n, beside the release's masks."""
    ids = torch.randint(0, n_examples, (len(batch[0]),), generator=torch.Generator().manual_seed(1))
    shapes: list[torch.Size] = []
    layers = dropout_layers(tied)
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[1:])) for layer in layers]
    with torch.no_grad(), AllocatedBytes() as allocated:
        tied(batch[0], ids=ids.to(batch[0].device))
    for hook in hooks:
        hook.remove()
    held = sum(t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, Tensor))
    masks = sum(shape.numel() for shape in shapes) * 4 * n_examples
    return {
        "n_examples": n_examples,
        "bytes_of_a_forward_pass": allocated.total,
        "bytes_held_by_the_layers": held,
        "bytes_of_the_releases_masks": masks,
    }


def medians(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return each way's median seconds, and the median over rounds of its ratio to the first way of the round."""
    seconds = time_in_turn(steps, rounds, device)
    first = next(iter(seconds.values()))
    return {
        way: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(t / f for t, f in zip(times, first, strict=True)),
        }
        for way, times in seconds.items()
    }


def deployed(model: nn.Module, tied: nn.Module, inputs: Tensor, rounds: int) -> list[dict[str, object]]:
    """Return size and time of the network without dropout, in mode `dropped`, and pruned."""
    device = inputs.device
    pruned = prune(tied).to(memory_format=torch.channels_last)
    ways = {"(d) no dropout": model.eval(), "(e) dropped": tied.eval(), "(f) pruned": pruned.eval()}
    with torch.no_grad(), dropout_mode(tied, "dropped"):
        runs = {way: (lambda network=network: network(inputs)) for way, network in ways.items()}
        times = medians(runs, rounds, device)
        sizes = {way: model_size(network, SHAPE) for way, network in ways.items()}
        gap = (pruned(inputs) - tied(inputs)).abs().max().item()
    return [
        {
            "way": way,
            **vars(sizes[way]),
            "images_per_second": len(inputs) / time["seconds"],
            "speed_up": 1 / time["ratio"],
            "largest_difference_to_dropped": gap if way == "(f) pruned" else None,
        }
        for way, time in times.items()
    ]


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return all that the table shows."""
    batch = batch_of(options.batch, device)
    model = network(device, options.width)
    tied = tie(model, p_gen=options.p_gen, p_mem=options.p_mem, seed=0)
    steps = {
        "(a) step without dropout": step_of(model, batch, device),
        "(b) step with example-tied dropout": step_of(tied, batch, device),
        "(c) the six layers alone": layers_alone(tied, batch, device),
    }
    training = medians(steps, options.rounds, device)
    return {
        "training": training,
        "memory": [layer_bytes(tied, batch, n) for n in NUMBERS_OF_EXAMPLES],
        "deployed": deployed(model, tied, batch[0], 3 * options.rounds),
    }


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description="Time example-tied dropout in training, and its pruned network.")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--p-gen", type=float, default=0.2)
    parser.add_argument("--p-mem", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/example_tied_dropout.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = measure(options, device)
    for way, row in measured["training"].items():
        print(f"{way:36} {row['seconds'] * 1e3:9.1f} ms = {row['ratio']:.4f} of (a)")
    for row in measured["memory"]:
        print(
            f"{row['n_examples']:>13,} examples: forward pass makes {row['bytes_of_a_forward_pass'] / 1e6:.1f} MB, the "
            f"layers hold {row['bytes_held_by_the_layers']} bytes; the release's masks would be "
            f"{row['bytes_of_the_releases_masks'] / 1e9:,.0f} GB"
        )
    for row in measured["deployed"]:
        print(
            f"{row['way']:16} {row['n_parameters']:>10,} parameters, {row['flops'] / 1e6:7.1f} MFLOP an image, "
            f"{row['images_per_second']:7.1f} images/s, {row['speed_up']:.2f} times as fast as (d)"
        )
    if options.save:
        chosen = {name: getattr(options, name) for name in ("batch", "rounds", "width", "p_gen", "p_mem")}
        save("example_tied_dropout", measured, device, **chosen)


if __name__ == "__main__":
    main()
