"""Several seeds of one setting on one card: a share of the card each, or all in one program.

(a) k processes at once, each training its own network (what the sweep does with fractions of a GPU);
(b) one process whose step trains k networks stacked along a new axis (`torch.func.vmap`): the same numbers
as k steps apart, to rounding. Its images are laid out channels first and its BatchNorms compute in float32, for
under `vmap` a GPU's refuse bfloat16 beside float32 statistics. One process with one network is the reference.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parents[1]))  # in a process of its own, where memlib is not installed

from gpu_sizes import PAPER, TINY, Sizes, network  # noqa: E402
from training import Batch, ours, random_batch  # noqa: E402

from memlib.batches import normalize  # noqa: E402
from memlib.config import Precision  # noqa: E402
from memlib.precision import autocast, resolve_precision  # noqa: E402

MODEL = "resnet9"


def measure_sharing(sizes: Sizes, device: torch.device) -> dict[str, object]:
    """Return a row a number of seeds and way: images/s of all together, and the ratio to the first row's.

    A way that fails is told in `skipped`; the others' rows stay.
    """
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for k in sizes.seeds:
        for way, measure in {"processes": at_once, "one program": _stacked_rate}.items():
            try:
                rows.append({"seeds": k, "way": way, "images_per_second": measure(k, sizes, device)})
            except (OSError, RuntimeError) as error:
                skipped.append(f"{way}, {k} seeds: {error}")
                print(skipped[-1], flush=True)
    reference = [r["images_per_second"] for r in rows if (r["seeds"], r["way"]) == (sizes.seeds[0], "processes")]
    for row in rows:
        row["times_as_fast"] = row["images_per_second"] / reference[0] if reference else None
        print(row)
    return {"model": MODEL, "batch": sizes.models[MODEL], "rows": rows, "skipped": skipped}


def at_once(k: int, sizes: Sizes, device: torch.device) -> float:
    """Return the images/s of k processes that train side by side."""
    command = [sys.executable, str(Path(__file__)), "--device", device.type, *(["--tiny"] if sizes is TINY else [])]
    command += ["--seconds", str(sizes.worker_seconds), "--threads", str(torch.get_num_threads())]
    workers = [
        subprocess.Popen([*command, "--seed", str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(k)
    ]
    try:
        for worker in workers:  # all are warm before any begins
            if _pipe(worker.stdout).readline().strip() != "ready":
                raise RuntimeError("a worker that was to share the card ended before it began; see its error above.")
        for worker in workers:
            _pipe(worker.stdin).write("go\n")
            _pipe(worker.stdin).flush()
        rates = [_pipe(worker.stdout).readline() for worker in workers]
        if not all(rates):
            raise RuntimeError("a worker that shared the card ended before it was done; see its error above.")
        return sum(map(float, rates))
    finally:
        for worker in workers:  # one that still waits for its turn reads the end of its input, and ends
            worker.communicate()


def stacked_step(
    models: Sequence[nn.Module], batches: Sequence[Batch], precision: Precision, device: torch.device
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Return a training step with accounting of all models at once, and their stacked parameters."""
    parameters, buffers = stack_module_state(list(models))
    skeleton = copy.deepcopy(models[0])
    for module in skeleton.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    images, labels, is_noisy = (torch.stack([batch[i] for batch in batches]).to(device) for i in range(3))
    sums = [[torch.zeros_like(p) for p in parameters.values()] for _ in range(2)]

    def forward(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(skeleton, (p, b), (x,))

    def step() -> None:
        inputs = torch.stack([normalize(own) for own in images])
        with autocast(precision, device):
            logits = vmap(forward, randomness="different")(parameters, buffers, inputs)
        each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        share = each / labels.shape[1]
        parts = (share.masked_fill(is_noisy, 0).sum(), share.masked_fill(~is_noisy, 0).sum())
        wanted = list(parameters.values())
        clean = torch.autograd.grad(parts[0], wanted, retain_graph=True)
        noisy = torch.autograd.grad(parts[1], wanted)
        for total, part in zip(sums, (clean, noisy), strict=True):
            torch._foreach_add_(total, list(part))
        for parameter, c, n in zip(wanted, clean, noisy, strict=True):
            # laid out like the parameter: the fused optimizer pairs elements by memory order
            parameter.grad = torch.empty_like(parameter).copy_(c + n)
        optimizer.step()

    return step, parameters


def _stacked_rate(k: int, sizes: Sizes, device: torch.device) -> float:
    models = [network(MODEL, sizes, device=device, seed=i) for i in range(k)]
    batch = random_batch(sizes.models[MODEL], sizes.shape)
    step, _ = stacked_step(models, [batch] * k, resolve_precision("auto", device), device)

    return k * len(batch[1]) * _steps_a_second(step, sizes.worker_seconds, device)


def _work(options: argparse.Namespace) -> None:
    """Train one network for some seconds once the parent says so, and print its images/s."""
    sizes, device = (TINY if options.tiny else PAPER), torch.device(options.device)
    torch.set_num_threads(options.threads)
    batch = random_batch(sizes.models[MODEL], sizes.shape)
    step = ours(batch, "auto", device, model=network(MODEL, sizes, device=device, seed=options.seed))

    def all_are_ready() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    print(len(batch[1]) * _steps_a_second(step, options.seconds, device, warm=all_are_ready), flush=True)


def _steps_a_second(
    step: Callable[[], object], seconds: float, device: torch.device, *, warm: Callable[[], None] = lambda: None
) -> float:
    """Return the steps done in a second of wall time; `warm` is called once the first few are done."""
    for _ in range(3):
        step()
    _wait(device)
    warm()
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        step()
        n += 1
        if n % 16 == 0:  # keeps the queue of launched work short
            _wait(device)
    _wait(device)
    return n / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the process was started without this pipe")
    return pipe


def main() -> None:
    """Be one of the processes that share a card."""
    parser = argparse.ArgumentParser(description="A worker of bench/gpu.py; not to be started by hand.")
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    _work(parser.parse_args())


if __name__ == "__main__":
    main()
