"""How much of the card the three models reach, and whether compiling or replaying the step pays.

Rates: FLOP/s of training with accounting, of a plain step and of float32 evaluation, against the card's
measured matrix rate. Ways: the step as it is, with the network compiled, and captured as a CUDA graph;
all must end at the same loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from gpu_sizes import Sizes, network
from timing import bandwidth, matrix_rates, time_in_turn
from torch import nn
from training import ours, plain, random_batch

from memlib.batches import normalize
from memlib.evaluation import predict
from memlib.precision import resolve_precision
from memlib.pruning import model_size

STEP_PASSES, PLAIN_PASSES = 5, 3  # forward 1, each backward pass 2
CAPTURE_WARM_UP = 3  # steps before a capture, on its stream


@dataclass(frozen=True)
class Rate:
    """How fast a model does one kind of work."""

    model: str
    work: str
    batch: int
    precision: str
    images_per_second: float
    flops_per_second: float


def measure_rates(sizes: Sizes, device: torch.device) -> dict[str, object]:
    """Return a row a model and kind of work: images/s, FLOP/s and the share of the matrix rate in its precision."""
    rates = matrix_rates(device)
    rows = []
    for name, batch in sizes.models.items():
        for rate in (*_training_rates(name, batch, sizes, device), *_evaluation_rates(name, sizes, device)):
            share = rate.flops_per_second / rates[rate.precision]
            rows.append({**asdict(rate), "share_of_matrix_rate": share})
            print(f"{name:9} {rate.work:44} {rate.images_per_second:12.1f} images/s, {share:.2f} of the matrix rate")
    return {"matrix_rates": rates, "bandwidth": bandwidth(device), "rows": rows}


def _training_rates(name: str, batch: int, sizes: Sizes, device: torch.device) -> Iterator[Rate]:
    data, precision = random_batch(batch, sizes.shape), resolve_precision("auto", device)
    flops = model_size(network(name, sizes, device=torch.device("cpu")), sizes.shape).flops
    passes = {"training with accounting": STEP_PASSES, "plain training": PLAIN_PASSES}
    steps = {
        "training with accounting": ours(data, precision, device, model=network(name, sizes, device=device)),
        "plain training": plain(data, precision, device, model=network(name, sizes, device=device)),
    }
    seconds = time_in_turn({k: _repeat(s, sizes.steps) for k, s in steps.items()}, sizes.rounds, device)
    for work, times in seconds.items():
        images_per_second = batch * sizes.steps / statistics.median(times)
        yield Rate(name, work, batch, precision, images_per_second, passes[work] * flops * images_per_second)


def _evaluation_rates(name: str, sizes: Sizes, device: torch.device) -> Iterator[Rate]:
    flops = model_size(network(name, sizes, device=torch.device("cpu")), sizes.shape).flops
    model = network(name, sizes, device=device).eval()
    images, labels, _ = random_batch(max(sizes.evaluation_batches), sizes.shape)
    images = images.to(device)  # as in a run, whose labels are moved by each evaluation
    ways = {f"evaluation by {b}": (b, _evaluation(model, images, labels, b)) for b in sizes.evaluation_batches}
    # Without TF32 cuDNN may have faster kernels for the other layout, or may find them only by trying. What it once
    # chose for a shape it keeps, so it tries at a batch size that no other way has.
    first = min(sizes.evaluation_batches)
    half = first // 2
    other = network(name, sizes, device=device).to(memory_format=torch.contiguous_format).eval()
    contiguous = {b: _contiguous_evaluation(other, images, labels, b) for b in (first, half)}
    ways |= {
        f"evaluation, contiguous, {first}": (first, contiguous[first]),
        f"evaluation, kernels tried, {half}": (half, _with_trials(_evaluation(model, images, labels, half))),
        f"evaluation, contiguous, kernels tried, {half}": (half, _with_trials(contiguous[half])),
    }
    for work, times in time_in_turn({work: way for work, (_, way) in ways.items()}, sizes.rounds, device).items():
        images_per_second = len(images) / statistics.median(times)
        yield Rate(name, work, ways[work][0], "float32", images_per_second, flops * images_per_second)


def _evaluation(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int) -> Callable[[], object]:
    return lambda: predict(model, images, labels, device=images.device, batch_size=batch)


def _contiguous_evaluation(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int
) -> Callable[[], object]:
    def work() -> object:
        inputs = normalize(images).contiguous()  # taken as they are; in the time, as it is in the other ways
        return predict(model, inputs, labels, device=images.device, batch_size=batch)

    return work


def _with_trials(evaluation: Callable[[], object]) -> Callable[[], object]:
    """Return the evaluation with cuDNN timing its kernels on the first batch of each shape."""

    def work() -> None:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            evaluation()
        finally:
            torch.backends.cudnn.benchmark = before

    return work


def measure_ways(sizes: Sizes, device: torch.device) -> dict[str, object]:
    """Return a row a way to run the step: seconds, and the parameters' distance to those of the step as it is."""
    name, batch = next(iter(sizes.models.items()))
    data = random_batch(batch, sizes.shape)
    models = {way: network(name, sizes, device=device, dropout=False) for way in ("as it is", "compiled")}
    models["compiled"].compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    steps: dict[str, Callable[[], object]] = {}
    skipped: list[str] = []
    for way, model in models.items():
        step = ours(data, "auto", device, model=model)
        try:
            _repeat(step, CAPTURE_WARM_UP)()  # as many steps as a capture's warm-up takes
            steps[way] = step
        except Exception as error:  # noqa: BLE001 - a compiler that is not there raises what it likes
            skipped.append(f"{way}: {type(error).__name__}: {error}")
    if device.type == "cuda":
        models["CUDA graph"] = network(name, sizes, device=device, dropout=False)
        try:
            steps["CUDA graph"] = captured(ours(data, "auto", device, model=models["CUDA graph"]))
        except RuntimeError as error:
            skipped.append(f"CUDA graph: {error}")
    else:
        skipped.append("CUDA graph: no CUDA device")
    seconds = time_in_turn({k: _repeat(s, sizes.steps) for k, s in steps.items()}, sizes.rounds, device)
    weights = {way: torch.cat([p.detach().flatten() for p in models[way].parameters()]) for way in steps}
    base = weights["as it is"]
    rows = [
        {
            "way": way,
            "seconds": statistics.median(times) / sizes.steps,
            "times_as_fast": statistics.median(seconds["as it is"]) / statistics.median(times),
            "distance_of_parameters": ((weights[way] - base).norm() / base.norm()).item(),
        }
        for way, times in seconds.items()
    ]
    for row in rows:
        print(row)
    return {"model": name, "batch": batch, "rows": rows, "skipped": skipped}


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Return a call that replays the step as one CUDA graph: no launch of its operations by the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _repeat(step: Callable[[], object], times: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            step()

    return work
