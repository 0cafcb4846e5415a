"""Layers with a gate on each unit: 1 leaves the unit as it is, 0 removes it.

Where a convolution, its BatchNorm and its ReLU follow each other, they are one convolution with a bias
(BatchNorm in evaluation mode is a scale and a shift), a gate vector that a whole batch shares multiplies
the filters themselves, and the gates' gradient needs only what the ReLU's backward pass has at hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from memlib.network_units import UnitLayer


class GatedLayer(nn.Module, ABC):
    """A layer under gates; `GatedNetwork` sets the attributes for one forward pass and clears them.

    gates: one vector [u] for the whole batch, or one an image [b, u]; None computes the intact layer.
    replayed: the output that is already known, None if it is to be computed.
    recording: whether to keep the output in `recorded`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates: Tensor | None = None
        self.replayed: Tensor | None = None
        self.recorded: Tensor | None = None
        self.recording = False
        self._version = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output under its gates."""
        if self.replayed is not None and not torch.is_grad_enabled():
            return self.replayed
        output = self.compute(x)
        if self.recording:
            self.recorded, self._version = output, output._version
        return output

    @property
    def is_replayable(self) -> bool:
        """Return whether the recorded output is still what the layer returned, not changed in place since."""
        return self.recorded is not None and self.recorded._version == self._version

    def clear(self) -> None:
        """Forget the forward pass."""
        self.gates = self.replayed = self.recorded = None
        self.recording = False

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """Return the output, whether or not it is already known."""


class GatedModule(GatedLayer):
    """Any module with gates on its output: bias + gate * (output - bias), or gate * output where `bias` is None."""

    def __init__(self, module: nn.Module, layer: UnitLayer, bias: Tensor | None) -> None:
        super().__init__()
        self.module, self.layer = module, layer
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def compute(self, x: Tensor) -> Tensor:
        """Return the module's output under the gates."""
        output = self.module(x)
        if self.gates is None:
            return output
        gates = self._laid_along(self.gates, output, fill=1.0)
        if self.bias is None:
            return output * gates
        kept = self._laid_along((1 - self.gates) * self.bias, output, fill=0.0)
        return torch.addcmul(kept.to(output.dtype), output, gates.to(output.dtype))

    def _laid_along(self, values: Float[Tensor, "*b u"], output: Tensor, *, fill: float) -> Tensor:
        """Return `values`, and `fill` for features that are no units, in a shape that broadcasts with the output."""
        layer, n_features = self.layer, output.shape[self.layer.dim]
        after = n_features - layer.first - layer.n_units
        values = F.pad(values, (layer.first, after), value=fill) if n_features > layer.n_units else values
        inner = output.dim() - 2  # dimensions besides image and feature
        if layer.dim == 1:
            return values.reshape(*values.shape, *[1] * inner)
        return values.reshape(*values.shape[:-1], *[1] * inner, n_features)


class GatedConvBlock(GatedLayer):
    """Convolution, BatchNorm and ReLU as one convolution with a bias, under gates.

    keeps_shift: a removed unit keeps the bias (its filter is gone), else it is zero.
    """

    weight: Tensor
    shift: Tensor

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, *, keeps_shift: bool) -> None:
        super().__init__()
        weight, shift = fold_batchnorm(convolution, norm)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("shift", shift)
        self.geometry: Any = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        self.keeps_shift = keeps_shift

    def compute(self, x: Tensor) -> Tensor:
        """Return the block's output under the gates; a known output still gets its gradient."""
        if self.gates is None:
            return F.conv2d(x, self.weight, self.shift, *self.geometry).relu_()
        if self.gates.dim() == 1:
            bias = self.shift if self.keeps_shift else self.shift * self.gates.detach()
            offset = self.shift if self.keeps_shift else torch.zeros_like(self.shift)
            arguments = (self.weight, bias, offset, self.geometry, self.replayed)
            return SharedGates.apply(x, self.gates, *arguments)  # pyright: ignore[reportReturnType]
        convolved = F.conv2d(x, self.weight, None, *self.geometry)
        gates, shift = self.gates[:, :, None, None], self.shift[:, None, None]
        return (torch.addcmul(shift, convolved, gates) if self.keeps_shift else (convolved + shift) * gates).relu()


class SharedGates(torch.autograd.Function):
    """relu(convolve(x, gates * weight) + bias), with gradients for x and the gates only.

    Before the ReLU stands u = gate * v + offset. A gate's slope is the sum of v * du; with gate 1 that is
    the sum of (u - offset) * du, and u is the output wherever du is not zero. A removed unit gets 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, *constants: Any) -> Tensor:  # noqa: ANN401
        """Return the output, the known one if `constants` (weight, bias, offset, geometry, known output) end in one."""
        weight, bias, offset, geometry, known = constants
        weight = weight * gates[:, None, None, None]
        output = F.conv2d(x, weight, bias, *geometry).relu_() if known is None else known.detach()
        ctx.save_for_backward(x, weight, offset, output)
        ctx.geometry = geometry
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients for x and the gates."""
        x, weight, offset, output = ctx.saved_tensors
        before_relu = torch.ops.aten.threshold_backward(gradients[0], output, 0)
        shift_part = before_relu.sum((0, 2, 3), dtype=torch.float32)
        for_gates = (before_relu * output).sum((0, 2, 3), dtype=torch.float32) - offset * shift_part
        for_x = None
        if ctx.needs_input_grad[0]:
            x, weight = x.to(before_relu.dtype), weight.to(before_relu.dtype)
            stride, padding, dilation, groups = ctx.geometry
            geometry = (stride, padding, dilation, False, [0, 0], groups)
            wanted = [True, False, False]  # for x; never for weight and bias
            for_x = torch.ops.aten.convolution_backward(before_relu, x, weight, None, *geometry, wanted)[0]
        return for_x, for_gates, None, None, None, None, None


def fold_batchnorm(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Return filters and bias of a convolution and its BatchNorm in evaluation mode as one, computed in float64."""
    weight = convolution.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias.detach().double()
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach().double()
        bias = (bias - norm.running_mean.double()) * scale
        bias = bias if norm.bias is None else bias + norm.bias.detach().double()
        weight = weight * scale[:, None, None, None]
    return weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype)
