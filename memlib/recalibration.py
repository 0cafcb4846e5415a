"""BatchNorm's running statistics estimated anew, for a network whose activations have changed.

Each statistic becomes the average over batches, all with the same weight, of the batches' own
(torch's `momentum=None`, as in its `update_bn` for averaged weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm


def batchnorms(network: nn.Module) -> dict[str, AnyBatchNorm]:
    """Return the BatchNorm layers that keep running statistics, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, AnyBatchNorm) and module.running_mean is not None
    }


def empty_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return running statistics, by buffer name, that have seen no batch yet."""
    return {
        f"{name}.{buffer}": torch.zeros_like(tensor)
        for name, module in batchnorms(network).items()
        for buffer, tensor in module.named_buffers()
    }


@contextmanager
def estimating(network: nn.Module) -> Iterator[None]:
    """Run a block in which every forward pass adds its batch to the running statistics, and only BatchNorm trains."""
    modules = list(batchnorms(network).values())
    before = [(module.training, module.momentum) for module in modules]
    for module in modules:
        module.training, module.momentum = True, None
    try:
        yield
    finally:
        for module, (training, momentum) in zip(modules, before, strict=True):
            module.training, module.momentum = training, momentum
