"""Evaluation of ResNet-9 at full width on clean, noisy and test examples, against the obvious way.

In turn in one process: (a) ours: every image once, in float32, channels last, uint8 images normalized in
batches, nothing read back before the end; (b) the obvious way: decoded PIL images through a DataLoader, a pass
for each split, contiguous, correct predictions counted with `.item()`; (c) ours in bfloat16, which measurements
do not use. The floor is the forward pass's FLOPs at the measured float32 matrix rate. `--save` keeps the rows in
bench/results/evaluation.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import matrix_rates, rows_of, save, time_in_turn
from torch import nn
from torch.utils.data import DataLoader, Subset
from training import SHAPE, Batch, PilImages, network, random_batch

from memlib.config import Precision
from memlib.evaluation import accuracy, predict
from memlib.pruning import model_size

OBVIOUS = "(b) the obvious way"


def ours(model: nn.Module, train: Batch, test: Batch, precision: Precision, device: torch.device) -> list[float]:
    """Return the accuracies on clean, noisy and test examples."""
    found = [predict(model, images, labels, device=device, precision=precision) for images, labels, _ in (train, test)]
    splits = (
        accuracy(found[0], train[1], ~train[2]),
        accuracy(found[0], train[1], train[2]),
        accuracy(found[1], test[1]),
    )
    return [split.accuracy for split in splits if split is not None]


@torch.no_grad()
def obvious(model: nn.Module, train: Batch, test: Batch, device: torch.device) -> list[float]:
    """Return the same accuracies as one would first write it."""
    train_pictures, found = PilImages(*train), []
    clean, noisy = (~train[2]).nonzero().flatten().tolist(), train[2].nonzero().flatten().tolist()
    for pictures in (Subset(train_pictures, clean), Subset(train_pictures, noisy), PilImages(*test)):
        correct, loss = 0, 0.0
        for inputs, labels, _ in DataLoader(pictures, batch_size=128):
            logits = model(inputs.to(device))
            loss += F.cross_entropy(logits, labels.to(device), reduction="sum").item()
            correct += (logits.argmax(1).cpu() == labels).sum().item()
        found.append(correct / len(pictures))
    return found


def measure(n: int, rounds: int, device: torch.device) -> dict[str, object]:
    """Return the medians and ratios of all ways on n training and n test images, and the floor."""
    train, test = random_batch(n), random_batch(n)
    model = network(device).eval()
    fast = network(device).eval().to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], list[float]]] = {
        "(a) ours, float32": partial(ours, fast, train, test, "float32", device),
        OBVIOUS: partial(obvious, model, train, test, device),
        "(c) ours, bfloat16": partial(ours, fast, train, test, "bfloat16", device),
    }
    agreement = [abs(a - b) for a, b in zip(ways["(a) ours, float32"](), ways[OBVIOUS](), strict=True)]
    print(f"largest difference of an accuracy between (a) and (b): {max(agreement):.4f}")
    rates = matrix_rates(device)
    flops = 2 * n * model_size(network(torch.device("cpu")), SHAPE).flops
    rows = rows_of(time_in_turn(ways, rounds, device), reference=OBVIOUS)
    return {"rows": rows, "images": 2 * n, "matrix_rates": rates, "floor_seconds": flops / rates["float32"]}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Time an evaluation of all splits against the obvious way.")
    parser.add_argument("--images", type=int, default=500, help="for training and as many for testing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/evaluation.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = measure(options.images, options.rounds, device)
    if options.save:
        save("evaluation", measured, device)


if __name__ == "__main__":
    main()
