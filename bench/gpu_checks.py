"""Does a GPU compute what the CPU computes? Masks, augmentation, losses, gradients, predictions, searched units.

Also: does the training loop leave the host free? A step must not read from the device.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from gpu_sizes import Sizes, network
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training import Batch

from memlib.augmentation import augment, draw_augmentation
from memlib.batches import normalize, training_batches
from memlib.config import TrainingConfig
from memlib.critical_units import find_critical_units
from memlib.datasets import ImageSet, load_dataset
from memlib.evaluation import predict
from memlib.example_tied_dropout import active_channels
from memlib.experiments import CriticalUnitsConfig
from memlib.precision import resolve_precision
from memlib.probes import TOLERANCE
from memlib.seeds import stream
from memlib.training import training_step
from memlib.training_state import TrainingState

Row = dict[str, object]
Resolved = Literal["float32", "bfloat16"]
CPU = torch.device("cpu")
READS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")
LOSS_LIMITS = {"float32": 1e-3, "bfloat16": 0.05}  # nats
GRADIENT_LIMIT = 5e-3  # relative to the norm; or what rounding does on the CPU, times the allowance
ALLOWANCES = {"float32": 3.0, "bfloat16": 1.5}
BFLOAT16_BATCH = 256  # BatchNorm over fewer images magnifies rounding
LARGEST_ID = 2**63 - 1
GPU_TESTS = ("tests/test_augmentation.py", "tests/test_example_tied_dropout.py")
ROOT = Path(__file__).parent.parent


def check(sizes: Sizes, device: torch.device) -> list[Row]:
    """Return a row a check: what is compared, the largest difference, the limit, and whether it held."""
    checks: dict[str, Callable[[], list[Row]]] = {
        "masks": lambda: [_masks(device)],
        "augmentation": lambda: [_augmentation(sizes, device)],
        "search": lambda: [_search(sizes, device)],
        "host reads": lambda: [_host_reads(sizes, device)],
    }
    for name, batch in sizes.models.items():
        checks[f"{name}: margins"] = partial(_predictions, name, min(batch, 64), sizes, device)
        checks[f"{name}, float32"] = partial(_step, name, min(batch, 64), sizes, device, "float32")
    checks["resnet9, bfloat16"] = partial(_step, "resnet9", BFLOAT16_BATCH, sizes, device, "bfloat16")
    checks["tests"] = lambda: [_tests(device)]
    return [row for what, performed in checks.items() for row in _attempt(what, performed)]


def _attempt(what: str, performed: Callable[[], list[Row]]) -> list[Row]:
    """Return a check's rows; a row that says so if it fails in another way than by not holding."""
    try:
        return performed()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other checks' rows are not to be lost
        reason = f"{type(error).__name__}: {error}"
        return [{"check": what, "difference": None, "limit": None, "held": False, "reason": reason}]


def host_reads(step: Callable[[], object]) -> dict[str, int]:
    """Return how often a call reads a value back from the device, by operation; empty if never."""
    step()  # what happens once only is no part of the loop
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return {event.key: event.count for event in profiler.key_averages() if event.key in READS}


def real_batch(size: int, shape: tuple[int, int, int]) -> Batch:
    """Return digits scaled to `shape`, with labels of which a tenth is wrong: on random pixels gradients cancel."""
    digits = load_dataset("digits", image_size=shape[1]).train.take(torch.arange(size))
    is_noisy = torch.arange(size) % 10 == 0
    return digits.images.expand(-1, shape[0], -1, -1), (digits.labels + is_noisy) % 10, is_noisy


def _row(what: str, difference: float, limit: float) -> Row:
    return {"check": what, "difference": difference, "limit": limit, "held": bool(difference <= limit)}


def _masks(device: torch.device) -> Row:
    ids = torch.randint(0, LARGEST_ID, (10_000,), generator=stream(0, "bench_ids"))
    kept = [active_channels(i, 64, kept=13, p_mem=0.1, key=7).cpu() for i in (ids, ids.to(device))]
    return _row("masks of example-tied dropout, 10,000 ids", int((kept[0] != kept[1]).sum()), 0)


def _augmentation(sizes: Sizes, device: torch.device) -> Row:
    images, _, _ = real_batch(256, sizes.shape)
    draws = draw_augmentation(256, ("crop", "flip"), generator=stream(0, "bench_augmentation"))
    there = augment(images.to(device), draws.to(device)).cpu()
    return _row(
        "pixels of cropped and flipped images", int((there.int() - augment(images, draws).int()).abs().max()), 0
    )


def _predictions(name: str, batch: int, sizes: Sizes, device: torch.device) -> list[Row]:
    images, labels, _ = real_batch(batch, sizes.shape)
    here, there = (
        predict(network(name, sizes, device=d), images, labels, device=d).margin.double() for d in (CPU, device)
    )
    difference = (here - there).abs().max() / here.abs().max()
    return [_row(f"{name}: margins, relative to the largest", difference.item(), TOLERANCE)]


def _step(name: str, batch: int, sizes: Sizes, device: torch.device, precision: Resolved) -> list[Row]:
    """Compare one training step in `precision` on the device with one in the next higher one on the CPU.

    How far rounding moves a gradient depends on the batch: it is measured here, and the device may add to it.
    """
    higher = "float32" if precision == "bfloat16" else "float64"
    exact, here = (_one_step(name, batch, sizes, CPU, p) for p in (higher, precision))
    there = _one_step(name, batch, sizes, device, precision)
    rows = [_row(f"{name}, {precision}: loss of a step", abs(exact[0] - there[0]), LOSS_LIMITS[precision])]
    for part, e, h, t in zip(("clean", "noisy"), exact[1:], here[1:], there[1:], strict=True):
        limit = max(GRADIENT_LIMIT, ALLOWANCES[precision] * ((e - h).norm() / e.norm()).item())
        rows.append(_row(f"{name}, {precision}: {part} gradient", ((e - t).norm() / e.norm()).item(), limit))
    return rows


def _one_step(
    name: str, batch: int, sizes: Sizes, device: torch.device, precision: Resolved | Literal["float64"]
) -> tuple[float, Tensor, Tensor]:
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = network(name, sizes, device=device, dropout=False).to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    state = TrainingState(model, optimizer, "bfloat16" if precision == "bfloat16" else "float32")
    images, labels, is_noisy = (t.to(device) for t in real_batch(batch, sizes.shape))
    loss, split = training_step(state, (normalize(images).to(dtype), labels, is_noisy), device=device)
    flat = [torch.cat([g.double().cpu().flatten() for g in part]) for part in (split.clean, split.noisy)]
    return loss.item(), flat[0], flat[1]


def _search(sizes: Sizes, device: torch.device) -> Row:
    """Compare the units found on both devices; examples count as learned by being labelled as predicted."""
    images, labels, _ = real_batch(24, sizes.shape)
    config = CriticalUnitsConfig(reference_size=16, max_steps=5)
    found = []
    for d in (CPU, device):
        model = network("resnet9", sizes, device=d).eval()
        predicted = predict(network("resnet9", sizes, device=CPU), images, labels, device=CPU).prediction
        data = ImageSet(images, predicted, torch.arange(24))
        search = find_critical_units(
            model, data.take(torch.arange(8)), data.take(torch.arange(8, 24)), config, seed=0, device=d
        )
        found.append([[(u.layer, u.unit) for u in e.removed] for e in search.found])
    differing = sum(a != b for a, b in zip(*found, strict=True)) + abs(len(found[0]) - len(found[1]))
    return _row("sequences of critical units that differ, of 8", differing, 1)  # one tie may be broken otherwise


def _host_reads(sizes: Sizes, device: torch.device) -> Row:
    """Look at the steps of an epoch as training takes them: order, crops and labels by position included."""
    images, labels, is_noisy = (t.to(device) for t in real_batch(64, sizes.shape))
    model = network("resnet9", sizes, device=device).train()
    precision = resolve_precision("auto", device)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.01, fused=True), precision)
    config = TrainingConfig(batch_size=16, augment=("crop",))
    batches = training_batches(images, config, seed=0, epoch=1, device=device)
    next(batches)  # an epoch's order and crops are drawn and moved to the device before its first batch

    def step() -> None:
        positions, inputs = next(batches)
        training_step(state, (inputs, labels[positions], is_noisy[positions]), device=device)

    if device.type == "cuda":
        step()
        torch.cuda.set_sync_debug_mode("error")  # raises at the first operation that waits
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return _row("values the host waits for in a training step", 0, 0)
    return _row("values read back in a training step", sum(host_reads(step).values()), 0)


def _tests(device: torch.device) -> Row:
    """Run the tests marked gpu where pytest and what they import are installed; else say so."""
    what = "tests marked gpu"
    lacking = [m for m in ("pytest", "hypothesis", "psutil") if importlib.util.find_spec(m) is None]
    if lacking or device.type != "cuda":
        reason = f"not run: {', '.join(lacking)} not installed" if lacking else "not run: no CUDA device"
        return {"check": what, "difference": None, "limit": 0, "held": None, "reason": reason}
    options = ["-q", "-o", "addopts=", "-o", "filterwarnings=default", "-m", "gpu"]
    command = [sys.executable, "-m", "pytest", *options, *GPU_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {**_row(what, done.returncode, 0), "output": (done.stdout + done.stderr)[-2000:]}
