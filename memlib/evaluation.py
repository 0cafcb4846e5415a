"""What a model predicts for each example, and how often that is the assigned label.

Always on un-augmented images, in evaluation mode, in float32 unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor, nn

from memlib.batches import model_inputs
from memlib.chunks import ChunkSize, images_at_once, run_in_chunks
from memlib.config import Precision
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.example_tied_dropout import dropout_layers, dropout_mode
from memlib.precision import autocast, exact_float32

T = TypeVar("T")

BATCH_SIZE = 1000  # images


@dataclass(frozen=True, eq=False)
class Predictions:
    """Per example, on the CPU: predicted label, margin of the assigned label, and its cross-entropy in nats.

    The margin is the assigned label's logit minus the largest other logit: positive exactly where
    the prediction is the assigned label (ties aside).
    """

    prediction: Int64[Tensor, " n"]
    margin: Float32[Tensor, " n"]
    loss: Float32[Tensor, " n"]


@dataclass(frozen=True)
class Accuracy:
    """Share of examples predicted as assigned in [0, 1], mean loss in nats, and their number (NaN-free: n > 0)."""

    accuracy: float
    loss: float
    n: int


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with every module in evaluation mode and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def predict(
    model: nn.Module,
    images: UInt8[Tensor, "n c h w"] | Float[Tensor, "n ..."],
    labels: Int64[Tensor, " n"],
    *,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    precision: Precision = "float32",
) -> Predictions:
    """Return the model's predictions for all images, judged against `labels`.

    uint8 images are normalized as in training; floating-point ones are taken as the model's inputs.
    The model is left in the mode it was in; images are moved to `device` batch by batch.
    batch_size: images at once; on a CPU fewer of more than 64 x 64 pixels; halved where they do not fit into memory.

    Raises:
        InputError: images and labels differ in number, `batch_size` is below 1, the model returns no logits, or not
            even one image fits.
    """
    return _predict(model, (images, labels, None), device=device, batch_size=batch_size, precision=precision)


def predict_in_mode(
    model: nn.Module,
    examples: ImageSet,
    *,
    mode: str,
    rescale: bool = False,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
) -> Predictions:
    """Return what a model with example-tied dropout predicts in a mode: `tied` (by the ids), `scaled` or `dropped`.

    In float32; `rescale` as in `example_tied_dropout.set_mode`. The model is left in the mode it was in.

    Raises:
        InputError: the mode is unknown, or the model has no example-tied dropout.
    """
    judged = (examples.images, examples.labels, examples.ids if mode == "tied" else None)
    with dropout_mode(model, mode, rescale=rescale):
        return _predict(model, judged, device=device, batch_size=batch_size, precision="float32")


def predict_deployed(model: nn.Module, examples: ImageSet, *, device: torch.device) -> Predictions:
    """Return what the model predicts as it would be deployed: in mode `dropped` with example-tied dropout."""
    if dropout_layers(model):
        return predict_in_mode(model, examples, mode="dropped", device=device)
    return predict(model, examples.images, examples.labels, device=device)


def predict_probabilities(
    model: nn.Module, images: UInt8[Tensor, "n c h w"] | Float[Tensor, "n ..."], *, device: torch.device
) -> Float32[Tensor, "n k"]:
    """Return the softmax of the model's logits for all images, on the CPU; otherwise (errors, too) like `predict`."""
    return _collect(model, images, lambda logits: logits.softmax(dim=1), device)


def predict_logits(
    model: nn.Module, images: UInt8[Tensor, "n c h w"] | Float[Tensor, "n ..."], *, device: torch.device
) -> Float32[Tensor, "n k"]:
    """Return the model's logits for all images, on the CPU; otherwise (errors, too) like `predict`."""
    return _collect(model, images, lambda logits: logits, device)


@torch.no_grad()
def _collect(
    model: nn.Module,
    images: Tensor,
    change: Callable[[Float32[Tensor, "b k"]], Float32[Tensor, "b k"]],
    device: torch.device,
) -> Float32[Tensor, "n k"]:
    pieces = _judge_logits(
        model,
        (images, None),
        lambda logits, _: change(logits).cpu(),
        device=device,
        batch_size=BATCH_SIZE,
        precision="float32",
    )
    return torch.cat(list(pieces))


@torch.no_grad()
def _predict(
    model: nn.Module,
    examples: tuple[Tensor, Int64[Tensor, " n"], Int64[Tensor, " n"] | None],
    *,
    device: torch.device,
    batch_size: int,
    precision: Precision,
) -> Predictions:
    images, labels, ids = examples
    if len(images) != len(labels):
        raise InputError(f"there are {len(images)} images and {len(labels)} labels; give as many of both.")
    labels = labels.to(device)  # once: a batch's would wait for the batch's forward pass
    pieces = _judge_logits(
        model,
        (images, None if ids is None else ids.to(device)),
        lambda logits, chosen: _judge(logits, labels[chosen]),
        device=device,
        batch_size=batch_size,
        precision=precision,
    )
    return Predictions(*(torch.cat(column).cpu() for column in zip(*pieces, strict=True)))


def _judge_logits(
    model: nn.Module,
    examples: tuple[Tensor, Int64[Tensor, " n"] | None],
    judge: Callable[[Float32[Tensor, "b k"], slice], T],
    *,
    device: torch.device,
    batch_size: int,
    precision: Precision,
) -> Iterator[T]:
    """Yield, batch after batch, what `judge` makes of the logits, on the device, and of where the batch lies."""
    images, ids = examples

    def work(chosen: slice) -> T:
        inputs = model_inputs(images[chosen], device)
        with_ids = {} if ids is None else {"ids": ids[chosen]}
        with autocast(precision, device):
            logits = class_logits(model, model(inputs, **with_ids))
        return judge(logits.float(), chosen)

    size = ChunkSize(images_at_once(images, batch_size, device))
    with evaluation_mode(model), exact_float32(device):
        yield from run_in_chunks(len(images), size, work)


def class_logits(model: nn.Module, output: object) -> Float[Tensor, "b k"]:
    """Return a network's output if it is logits, a tensor [examples, classes].

    Raises:
        InputError: it is anything else, such as a tuple or the output object of a Transformers model.
    """
    if isinstance(output, Tensor) and output.dim() == 2:
        return output
    kind = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise InputError(
        f"{type(model).__name__} returns {kind}, not logits [examples, classes]; wrap it in a module that does."
    )


def accuracy(
    predictions: Predictions, labels: Int64[Tensor, " n"], chosen: Bool[Tensor, " n"] | None = None
) -> Accuracy | None:
    """Return accuracy and loss over the chosen examples (default all), None if there are none."""
    correct = predictions.prediction == labels.cpu()
    loss = predictions.loss.double()
    if chosen is not None:
        correct, loss = correct[chosen.cpu()], loss[chosen.cpu()]
    if len(correct) == 0:
        return None
    return Accuracy(correct.double().mean().item(), loss.mean().item(), len(correct))


def _judge(
    logits: Float[Tensor, "b k"], labels: Int64[Tensor, " b"]
) -> tuple[Int64[Tensor, " b"], Float32[Tensor, " b"], Float32[Tensor, " b"]]:
    assigned = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return logits.argmax(dim=1), assigned - others, F.cross_entropy(logits, labels, reduction="none")
