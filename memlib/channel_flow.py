"""Which channels of a tied network's tensors are ever needed once memorization neurons are dropped.

Paper: none; it serves `pruning`. The network is traced (torch.fx). Tensors whose channels must agree
in number (before and after a BatchNorm, an activation, a pooling; the terms of a sum) form a
*stream*. A stream begins at convolutions and linear layers, which can give any leading part of
their channels, and at places of dropout, which give their generalization neurons and nothing
else. It is needed as far as its readers need it; what reads it in unknown ways needs it whole.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import TraceError

from memlib.errors import InputError
from memlib.example_tied_dropout import ExampleTiedDropout, generalization_neurons
from memlib.places import INSERTED

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Channel by channel, and zero where the input is zero.
ZERO_AT_ZERO = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Identity)
ZERO_AT_ZERO += (nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
FUNCTIONS = (F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, torch.tanh, F.dropout)
FUNCTIONS += (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, "relu", "contiguous", "tanh")
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
REDUCTIONS = (torch.amax, torch.mean, "amax", "mean")
SPATIAL_AXES = {2, 3, -1, -2}


@dataclass(eq=False)
class Stream:
    """Tensors with equally many channels: `width` of `full`, the leading ones."""

    full: int
    given: int | None = None  # channels that a place gives
    place: str = ""  # its name
    needed: int = 0
    reader: str = ""  # who needs the most
    merged: Stream | None = None

    def root(self) -> Stream:
        """Return the stream this one was joined to."""
        return self if self.merged is None else self.merged.root()

    @property
    def width(self) -> int:
        """Return how many channels are kept.

        Raises:
            InputError: a place has removed channels that something else of the stream still needs.
        """
        if self.given is None:
            return self.needed or self.full
        if self.needed > self.given:
            raise InputError(
                f"what is dropped after {self.place!r} is joined with channels that {self.reader!r} needs, so it "
                "cannot be removed; tie the model after that sum or layer too, with the same p_gen."
            )
        return self.given


@dataclass(frozen=True, eq=False)
class Flow:
    """One tensor: its stream, and how many of its leading channels can be other than zero.

    is_map: it is [B, C, H, W], else its channels come last. is_flat: it was a map, and each channel is now
    height x width features, one after the other.
    """

    stream: Stream
    alive: int
    is_map: bool
    is_flat: bool = False

    @property
    def full(self) -> int:
        """Return its number of channels before pruning."""
        return self.stream.full


@dataclass(eq=False)
class ChannelFlow:
    """What tracing found: by module name, the streams read and written, and those of each place."""

    reads: dict[str, Stream] = field(default_factory=dict)  # convolution, linear
    writes: dict[str, Stream] = field(default_factory=dict)  # the same, and layers that work channel by channel
    places: dict[str, tuple[Stream, int]] = field(default_factory=dict)  # what comes in, and the channels kept of it


def trace_channels(model: nn.Module) -> ChannelFlow:
    """Return the channel flow of a model with example-tied dropout, as in mode `dropped`.

    Raises:
        InputError: the model cannot be traced, or dropped channels reach a layer that mixes them with others.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except (TraceError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{type(model).__name__} cannot be traced ({reason}), so it cannot be pruned; use it in mode 'dropped'."
        ) from error
    analysis = _Analysis(dict(model.named_modules()), Counter(n.target for n in graph.nodes if n.op == "call_module"))
    for node in graph.nodes:
        analysis.visit(node)
    return analysis.found


class _Tracer(fx.Tracer):
    """Shows each dropout layer as a call of its own, also behind torch's own layers, whose hooks fx passes over."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ExampleTiedDropout) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        output = super().call_module(m, forward, args, kwargs)
        if hasattr(m, INSERTED) and self.is_leaf_module(m, self.path_of_module(m)):
            layer = getattr(m, INSERTED)
            output = super().call_module(layer, layer.forward, (output,), {})
        return output


class _Analysis:
    """Walks the graph once, in order of computation."""

    def __init__(self, modules: dict[str, nn.Module], calls: Counter) -> None:
        self.modules, self.calls = modules, calls
        self.flows: dict[fx.Node, Flow] = {}
        self.found = ChannelFlow()

    def visit(self, node: fx.Node) -> None:
        """Give the node's output its flow, if one can be told."""
        inputs = [self.flows[n] for n in node.all_input_nodes if n in self.flows]
        flow = None
        if len(inputs) == len(node.all_input_nodes) and inputs and node.op != "output":
            flow = self._module(node, inputs[0]) if node.op == "call_module" else self._function(node, inputs)
        elif node.op == "call_module" and not inputs:
            flow = self._module(node, None)
        if flow is not None:
            self.flows[node] = flow
        else:
            for source in inputs:
                self._read_whole(source, str(node.target))

    def _module(self, node: fx.Node, source: Flow | None) -> Flow | None:
        name, module = str(node.target), self.modules[str(node.target)]
        if isinstance(module, ExampleTiedDropout):
            return self._place(name, module, source)
        once = self.calls[node.target] == 1  # one weight for two streams is left as it is
        if once and (type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)):
            return self._layer(name, module, source)
        if source is None:
            return None
        if once and _works_by_channel(module, source):
            self.found.writes[name] = source.stream
            stays_zero = isinstance(module, nn.Conv2d) and module.bias is None
            return source if stays_zero else replace(source, alive=source.full)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return _flatten(source)
        return source if type(module) in ZERO_AT_ZERO else None

    def _place(self, name: str, layer: ExampleTiedDropout, source: Flow | None) -> Flow:
        if source is None or source.is_flat:
            raise InputError(
                f"the channels before the dropout after {layer.name!r} cannot be told, so it cannot be pruned; use the "
                "model in mode 'dropped', or tie it elsewhere (before a flattening, not behind it)."
            )
        kept = generalization_neurons(source.full, layer.p_gen, layer=layer.name)
        self._read(source, kept, layer.name)
        self.found.places[name] = (source.stream, kept)
        return replace(source, stream=Stream(full=source.full, given=kept, place=layer.name), alive=kept)

    def _layer(self, name: str, module: nn.Module, source: Flow | None) -> Flow | None:
        """A convolution or linear layer: it reads what is not zero and begins a stream of any width."""
        is_map = not isinstance(module, nn.Linear)
        size_in, size_out = layer_sizes(module)
        if source is not None:
            if source.is_map != is_map or size_in % source.full:
                self._read_whole(source, name)
            else:
                self._read(source, source.alive, name)
                self.found.reads[name] = source.stream
        stream = Stream(full=size_out)
        self.found.writes[name] = stream
        return Flow(stream, size_out, is_map)

    def _function(self, node: fx.Node, inputs: list[Flow]) -> Flow | None:
        target, first = node.target, inputs[0]
        if target in FUNCTIONS and len(inputs) == 1:
            return first
        if target in SUMS or target in PRODUCTS:
            return self._join(node, inputs)
        if target in REDUCTIONS and first.is_map and len(inputs) == 1:
            axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            if not isinstance(axes, tuple | list) or len(axes) != 2 or not set(axes) <= SPATIAL_AXES:
                return None
            return replace(first, is_map=bool(node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])))
        if target in (torch.flatten, "flatten") and tuple(node.args[1:]) == (1,) and not node.kwargs:
            return _flatten(first)
        return None

    def _join(self, node: fx.Node, inputs: list[Flow]) -> Flow | None:
        is_sum = node.target in SUMS
        if len(inputs) == 1:
            return replace(inputs[0], alive=inputs[0].full) if is_sum else inputs[0]
        a, b = inputs
        if (a.full, a.is_map, a.is_flat) != (b.full, b.is_map, b.is_flat):
            return None
        alive = max(a.alive, b.alive) if is_sum else min(a.alive, b.alive)
        return replace(a, stream=_merge(a.stream.root(), b.stream.root()), alive=alive)

    def _read(self, source: Flow, channels: int, reader: str) -> None:
        stream = source.stream.root()
        if min(channels, source.alive) > stream.needed:
            stream.needed, stream.reader = min(channels, source.alive), reader

    def _read_whole(self, source: Flow, reader: str) -> None:
        """Something of unknown ways reads it: it must find all channels, so none may have been dropped."""
        if source.alive < source.full:
            raise InputError(
                f"what is dropped after {source.stream.root().place!r} reaches {reader!r}, which may mix channels, so "
                "it cannot be removed; use the model in mode 'dropped', or tie it elsewhere."
            )
        self._read(source, source.full, reader)


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """Return the number of channels or features a convolution or linear layer reads and gives."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    raise TypeError(f"{type(module).__name__} is no convolution or linear layer")


def _works_by_channel(module: nn.Module, source: Flow) -> bool:
    if type(module) is nn.BatchNorm1d:
        return not source.is_map and module.num_features % source.full == 0
    if type(module) is nn.BatchNorm2d:
        return source.is_map
    return type(module) is nn.Conv2d and module.groups == module.out_channels == source.full


def _flatten(source: Flow) -> Flow | None:
    return replace(source, is_map=False, is_flat=True) if source.is_map else None


def _merge(a: Stream, b: Stream) -> Stream:
    if a is b:
        return a
    if a.given is not None and b.given is not None and a.given != b.given:
        raise InputError(
            f"{a.place!r} keeps {a.given} channels and {b.place!r} {b.given}, but both are joined; "
            "give both the same p_gen."
        )
    if b.needed > a.needed:
        a.needed, a.reader = b.needed, b.reader
    if a.given is None:
        a.given, a.place = b.given, b.place
    b.merged = a
    return a
