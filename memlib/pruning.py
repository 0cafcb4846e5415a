"""Remove the memorization neurons for good: a smaller, ordinary network that answers as mode `dropped` does.

Paper: example-tied dropout; dropping its memorization neurons is its deployed model.
Deviations: the release multiplies activations by zero, so its deployed model costs as much as the
whole one. Here channels that are always zero leave the weights around them: filters, rows,
BatchNorm statistics and the input channels of what follows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.utils.flop_counter import FlopCounterMode

from memlib.channel_flow import BATCHNORMS, ChannelFlow, Stream, layer_sizes, trace_channels
from memlib.errors import InputError
from memlib.example_tied_dropout import ExampleTiedDropout, channel_axis, dropout_layers, untie
from memlib.places import INSERTED, insert_after

VECTORS = ("weight", "bias", "running_mean", "running_var")  # of a BatchNorm


@dataclass(frozen=True)
class ModelSize:
    """Number of parameters, and FLOPs (2 a multiply-add) of one image's forward pass."""

    n_parameters: int
    flops: int


class LeadingChannels(nn.Module):
    """The first channels of its input, times a factor: what is left of a dropout layer whose input is needed whole."""

    def __init__(self, channels: int, factor: float = 1.0) -> None:
        super().__init__()
        self.channels, self.factor = channels, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the leading channels."""
        leading = x.narrow(channel_axis(x), 0, self.channels)
        return leading if self.factor == 1 else leading * self.factor


def prune(model: nn.Module) -> nn.Module:
    """Return an ordinary network without the memorization neurons, for use without ids; the model is left unchanged.

    Its outputs equal those of mode `dropped` (with the layers' rescaling, if set) to float32 rounding. It is
    of the model's class, on its device; parameters keep their names and shrink.

    Raises:
        InputError: the model has no example-tied dropout, or a BatchNorm that has never seen a batch, cannot be
            traced, or drops channels that something else still needs.
    """
    if not dropout_layers(model):
        raise InputError("the model has no example-tied dropout, so nothing is to be pruned; tie and train it first.")
    _check_trained(model)
    flow = trace_channels(model)
    pruned = untie(model)
    for name, module in pruned.named_modules():
        if isinstance(module, BATCHNORMS) and name in flow.writes:
            _shrink_batchnorm(module, flow.writes[name].root())
        elif name in flow.writes:
            _shrink_layer(name, module, flow)
    return insert_after(pruned, _remainders(model, flow))


def model_size(model: nn.Module, image_shape: tuple[int, int, int]) -> ModelSize:
    """Return the model's size; its forward pass is counted without being computed. It must not need ids."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, *image_shape, device="meta"))
    return ModelSize(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def _check_trained(model: nn.Module) -> None:
    for name, module in model.named_modules():
        seen = getattr(module, "num_batches_tracked", None)
        if isinstance(module, BATCHNORMS) and seen is not None and int(seen) == 0:
            raise InputError(
                f"BatchNorm {name!r} has never seen a batch, so the model is not trained; train it, or load a "
                "trained state, before pruning."
            )


def _remainders(model: nn.Module, flow: ChannelFlow) -> dict[str, nn.Module]:
    """Return, by module, what must stay in place of its dropout layer."""
    remainders = {}
    for name, (stream, kept) in flow.places.items():
        layer = model.get_submodule(name)
        factor = layer.rescaling if isinstance(layer, ExampleTiedDropout) else 1.0
        if stream.root().width > kept or factor != 1:
            remainders[name.removesuffix(f".{INSERTED}")] = LeadingChannels(kept, factor)
    return remainders


def _shrink_layer(name: str, module: nn.Module, flow: ChannelFlow) -> None:
    """Keep the leading filters or rows, and the input channels that are left, of a convolution or linear layer."""
    kept_out = flow.writes[name].root().width
    size_in, size_out = layer_sizes(module)
    kept_in = size_in
    if name in flow.reads:
        kept_in = _scaled(size_in, flow.reads[name].root())
    elif isinstance(module, nn.Conv2d) and module.groups > 1:  # channel by channel
        kept_in = module.groups = kept_out
    weight = module.get_parameter("weight")
    module.weight = _parameter(weight, weight[:kept_out, : min(kept_in, weight.shape[1])])
    if module.bias is not None:
        module.bias = _parameter(module.get_parameter("bias"), module.get_parameter("bias")[:kept_out])
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = kept_in, kept_out
    elif isinstance(module, nn.Conv2d):
        module.in_channels, module.out_channels = kept_in, kept_out


def _shrink_batchnorm(module: AnyBatchNorm, stream: Stream) -> None:
    kept = _scaled(module.num_features, stream)
    for name in VECTORS:
        vector = getattr(module, name)
        if isinstance(vector, nn.Parameter):
            setattr(module, name, _parameter(vector, vector[:kept]))
        elif vector is not None:
            setattr(module, name, vector[:kept].clone())
    module.num_features = kept


def _scaled(size: int, stream: Stream) -> int:
    """Return how much of `size` is kept; flattened maps have height x width features a channel, one after the other."""
    return size * stream.width // stream.full


def _parameter(before: nn.Parameter, part: Tensor) -> nn.Parameter:
    return nn.Parameter(part.detach().clone(), requires_grad=before.requires_grad)
