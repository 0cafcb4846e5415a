"""BatchNorm's running statistics estimated anew, for a network whose activations have changed.

Each statistic becomes the average over batches, all with the same weight, of the batches' own
(torch's `momentum=None`, as in its `update_bn` for averaged weights).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm

from memlib.batches import model_inputs, split_order
from memlib.chunks import images_at_once
from memlib.errors import InputError
from memlib.evaluation import evaluation_mode
from memlib.precision import exact_float32


def batchnorms(network: nn.Module, among: Collection[str] | None = None) -> dict[str, AnyBatchNorm]:
    """Return the BatchNorm layers that keep running statistics, by name; only those `among` these, if given."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, AnyBatchNorm) and module.running_mean is not None and (among is None or name in among)
    }


def empty_statistics(network: nn.Module, among: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return running statistics, by buffer name, that have seen no batch yet; `among` as for `batchnorms`."""
    return {
        f"{name}.{buffer}": torch.zeros_like(tensor)
        for name, module in batchnorms(network, among).items()
        for buffer, tensor in module.named_buffers()
    }


@torch.no_grad()
def recalibrate(
    model: nn.Module, images: UInt8[Tensor, "n c h w"], *, device: torch.device, batch_size: int = 500
) -> nn.Module:
    """Return a copy of the model whose BatchNorm statistics are those of `images`, in order, in batches.

    Give training images, augmented if training was: on CIFAR-10 without its crops and flips it cost 3 points of test.
    Shuffle them if they are sorted by class: a batch of one class has too small a variance. Of images beyond 64 x 64
    fewer make a batch.

    Everything but BatchNorm is in evaluation mode, and example-tied dropout in the mode it is set to, which
    must be one without ids. Computed in float32 on the model's device, `device`; the model is left unchanged.

    Raises:
        InputError: the model has no BatchNorm that keeps statistics, or `batch_size` is below 1.
    """
    if not batchnorms(model):
        raise InputError(f"{type(model).__name__} has no BatchNorm whose statistics could be recalibrated.")
    recalibrated = copy.deepcopy(model)
    recalibrated.load_state_dict(empty_statistics(recalibrated), strict=False)
    with evaluation_mode(recalibrated), estimating(recalibrated), exact_float32(device):
        for batch in split_order(torch.arange(len(images)), images_at_once(images, batch_size)):
            recalibrated(model_inputs(images[batch], device))
    return recalibrated


@contextmanager
def estimating(network: nn.Module, among: Collection[str] | None = None) -> Iterator[None]:
    """Run a block in which every forward pass adds its batch to the running statistics, and only BatchNorm trains.

    `among` as for `batchnorms`.
    """
    modules = list(batchnorms(network, among).values())
    before = [(module.training, module.momentum) for module in modules]
    for module in modules:
        module.training, module.momentum = True, None
    try:
        yield
    finally:
        for module, (training, momentum) in zip(modules, before, strict=True):
            module.training, module.momentum = training, momentum
