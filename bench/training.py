"""One training step of ResNet-9 at full width with gradient accounting, against two other ways.

In turn in one process: (a) ours; (b) a plain step without accounting, on the same numeric path;
(c) the obvious way, written out below: decoded PIL images through a DataLoader with 2 workers,
float32, contiguous, three backward passes, every gradient copied to the CPU. (d) is ours forced to
the other precision. Printed are medians, ratios, and the share of this machine's matrix rate in
the same precision, as measured here, that the convolutions' FLOPs amount to. `--save` keeps the rows in
bench/results/training.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timing import matrix_rates, save, time_in_turn
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.transforms import v2

from memlib.batches import normalize
from memlib.config import ModelConfig, Precision
from memlib.gradient_accounting import add_to_sums_, zero_sums
from memlib.models import build_model
from memlib.precision import autocast, resolve_precision
from memlib.pruning import model_size
from memlib.training import training_step
from memlib.training_state import TrainingState

SHAPE = (3, 32, 32)
BATCHES_AN_EPOCH = 4  # of the obvious way's loader
PASSES = {"(a)": 5, "(b)": 3, "(c)": 7, "(d)": 5}  # forward 1, each backward 2
Batch = tuple[Tensor, Tensor, Tensor]  # uint8 images, labels, is_noisy


class PilImages(Dataset):
    """What most code has: PIL images, turned into tensors one by one in worker processes."""

    def __init__(self, images: Tensor, labels: Tensor, is_noisy: Tensor) -> None:
        self.images = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
        self.targets = list(zip(labels.tolist(), is_noisy.tolist(), strict=True))
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        return self.transform(self.images[index]), *self.targets[index]


def network(device: torch.device) -> nn.Module:
    """Return a fresh full-width ResNet-9."""
    return build_model(ModelConfig(), image_shape=SHAPE, num_classes=10, seed=0).to(device)


def sgd(model: nn.Module, *, fused: bool) -> torch.optim.SGD:
    """Return the paper's optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)


def ours(
    data: Batch, precision: Precision, device: torch.device, *, model: nn.Module | None = None
) -> Callable[[], None]:
    """Return a step of memlib's training with accounting, by default of a fresh ResNet-9."""
    images, labels, is_noisy = (t.to(device) for t in data)
    model = (network(device) if model is None else model).to(memory_format=torch.channels_last)
    state = TrainingState(model, sgd(model, fused=True), resolve_precision(precision, device))
    sums = zero_sums(list(model.parameters()))

    def step() -> None:
        _, gradients = training_step(state, (normalize(images), labels, is_noisy), device=device)
        add_to_sums_(sums, gradients)

    return step


def plain(
    data: Batch, precision: Precision, device: torch.device, *, model: nn.Module | None = None
) -> Callable[[], None]:
    """Return a step without accounting, on the same numeric path as ours."""
    images, labels, _ = (t.to(device) for t in data)
    model = (network(device) if model is None else model).to(memory_format=torch.channels_last)
    optimizer = sgd(model, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, device):
            logits = model(normalize(images))
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def obvious(data: Batch, device: torch.device) -> Callable[[], None]:
    """Return a step as one would first write it."""
    model = network(device)
    optimizer = sgd(model, fused=False)
    pictures = ConcatDataset([PilImages(*data)] * BATCHES_AN_EPOCH)
    loader = DataLoader(pictures, batch_size=len(data[1]), shuffle=True, num_workers=2, persistent_workers=True)

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def step() -> None:
        inputs, labels, is_noisy = (t.to(device) for t in next(batches))
        loss = F.cross_entropy(model(inputs), labels, reduction="none") / len(labels)
        kept = []
        for part in (loss[~is_noisy].sum(), loss[is_noisy].sum(), loss.sum()):
            optimizer.zero_grad()
            part.backward(retain_graph=True)
            kept.append([p.grad.cpu().clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()

    return step


def where_time_goes(step: Callable[[], None], steps: int = 3) -> list[tuple[str, float]]:
    """Return the operations of a step with their shares of its time, largest first."""
    step()
    with profile(acc_events=True) as profiler:
        for _ in range(steps):
            step()
    kind = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    # Operations, not their kernels too, which a GPU's profile lists beside them.
    operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    times = {event.key: getattr(event, kind) for event in operations}
    total = sum(times.values())
    return sorted(((name, t / total) for name, t in times.items()), key=lambda item: -item[1])[:8]


def random_batch(size: int, shape: tuple[int, int, int] = SHAPE) -> Batch:
    """Return uint8 images, labels and is_noisy (a tenth), by default as large as CIFAR-10's."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
    labels, is_noisy = rng.integers(0, 10, size), rng.random(size) < 0.1
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(is_noisy)


def precision_of(way: str) -> str:
    """Return the precision a way computes in, from its name; the obvious way's is float32."""
    return "bfloat16" if "bfloat16" in way else "float32"


def measure(batch: int, rounds: int, device: torch.device) -> dict[str, object]:
    """Return medians and ratios of all ways, and the matrix rates they are held against."""
    fast = resolve_precision("auto", device)
    other: Precision = "float32" if fast == "bfloat16" else "bfloat16"
    data = random_batch(batch)
    steps = {
        f"(a) ours, {fast}": ours(data, fast, device),
        f"(b) plain step, {fast}": plain(data, fast, device),
        "(c) the obvious way": obvious(data, device),
        f"(d) ours, {other}": ours(data, other, device),
    }
    seconds = {way: statistics.median(times) for way, times in time_in_turn(steps, rounds, device).items()}
    flops = model_size(network(torch.device("cpu")), SHAPE).flops
    rates = matrix_rates(device)
    a_seconds = next(iter(seconds.values()))
    rows = [
        {
            "way": way,
            "images_per_second": batch / median,
            "ratio": median / a_seconds,
            "flops_per_second": (rate := PASSES[way[:3]] * flops * batch / median),
            "share_of_float32_matrix_rate": rate / rates["float32"],
            "share_of_its_matrix_rate": rate / rates[precision_of(way)],
        }
        for way, median in seconds.items()
    ]
    return {"rows": rows, "matrix_rates": rates, "profile": where_time_goes(next(iter(steps.values())))}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Time a training step with gradient accounting against other ways.")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/training.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured: dict[str, Any] = measure(options.batch, options.rounds, device)
    for row in measured["rows"]:
        print(
            f"{row['way']:24} {row['images_per_second']:8.1f} images/s, ours is {row['ratio']:.2f} times as fast, "
            f"{row['flops_per_second'] / 1e9:.0f} GFLOP/s "
            f"= {row['share_of_its_matrix_rate']:.2f} of the matrix rate in its precision"
        )
    print("matrix rates:", ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in measured["matrix_rates"].items()))
    print("ours by operation:", ", ".join(f"{name} {share:.0%}" for name, share in measured["profile"]))
    if options.save:
        save("training", measured, device, batch=options.batch)


if __name__ == "__main__":
    main()
