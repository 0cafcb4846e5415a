"""A network with a gate on every unit: the gates of an edited network are one vector of zeros and ones.

A batch shares one vector or has one an image, so many edited networks are computed side by side. No
weight gradient is ever computed: the gates are the only leaves.

What lies before the first removed unit is the intact network's. `record` keeps every layer's output for
a batch, and a pass over the same batch under gates takes that prefix from there (`Replay`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memlib.experiments import Removal
from memlib.gates import GatedConvBlock, GatedLayer, GatedModule
from memlib.network_units import NetworkUnits, UnitLayer


@dataclass(frozen=True, eq=False)
class Replay:
    """The intact network's outputs for a batch, one a layer of units, of which the first `n_layers` are true."""

    outputs: Sequence[Tensor | None]  # None where the model changes the output in place: it is computed again
    n_layers: int


class GatedNetwork:
    """A gated copy of a model, in evaluation mode, without parameter gradients; the model is left as it was."""

    def __init__(self, model: nn.Module, units: NetworkUnits) -> None:
        self.units = units
        self._sizes = [layer.n_units for layer in units.layers]
        self._network = _copy(model)
        self._layers = [_install(self._network, layer, units.removal) for layer in units.layers]

    def logits(
        self, inputs: Float[Tensor, "b c h w"], gates: Float[Tensor, "*b u"], *, replay: Replay | None = None
    ) -> Float[Tensor, "b k"]:
        """Return the logits under `gates`: one vector for the whole batch, or one an image.

        Under enabled gradients only fused layers spare their forward pass by `replay`.
        """
        for index, own in enumerate(gates.split(self._sizes, dim=-1)):
            self._layers[index].gates = own
            if replay is not None and index < replay.n_layers:
                self._layers[index].replayed = replay.outputs[index]
        try:
            return self._network(inputs).float()
        finally:
            self._clear()

    @torch.no_grad()
    def record(self, inputs: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], list[Tensor | None]]:
        """Return the intact network's logits and the output of every layer of units, for a `Replay`."""
        for layer in self._layers:
            layer.recording = True
        try:
            logits = self._network(inputs).float()
            return logits, [layer.recorded if layer.is_replayable else None for layer in self._layers]
        finally:
            self._clear()

    def intact_layers(self, gates: Float[Tensor, " u"]) -> int:
        """Return how many layers stand before the first removed unit, and so compute what the intact network does.

        Layers are in order of execution. One that is called more than once may be called behind the removed
        unit too, and ends the prefix.
        """
        removed = [bool((own == 0).any()) for own in gates.split(self._sizes)]
        ends = (gone or not layer.called_once for gone, layer in zip(removed, self.units.layers, strict=True))
        return next((index for index, end in enumerate(ends) if end), len(removed))

    def _clear(self) -> None:
        for layer in self._layers:
            layer.clear()


def _copy(model: nn.Module) -> nn.Module:
    network = copy.deepcopy(model).eval().requires_grad_(False)
    for module in network.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False  # what it overwrites is needed by the backward pass and by replays
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def _install(network: nn.Module, layer: UnitLayer, removal: Removal) -> GatedLayer:
    """Replace the layer's modules in `network` by a gated one, and return it."""
    module = network.get_submodule(layer.name)
    if layer.fused:
        norm = None if layer.norm is None else network.get_submodule(layer.norm)
        block = GatedConvBlock(module, norm, keeps_shift=removal == "filter")  # pyright: ignore[reportArgumentType]
        _replace(network, layer.name, block)
        if layer.norm is not None:
            _replace(network, layer.norm, nn.Identity())
        if layer.own_relu is not None:  # a ReLU shared by several layers stays: a second one changes nothing
            _replace(network, layer.own_relu, nn.Identity())
        return block
    bias = getattr(module, "bias", None) if removal == "filter" else None
    kept = None if bias is None else bias[layer.first : layer.first + layer.n_units]
    gated = GatedModule(network.get_submodule(layer.site), layer, kept)
    _replace(network, layer.site, gated)
    return gated


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the module's place under every name it has: a network may hold one under several."""
    old = network.get_submodule(name)
    for parent in list(network.modules()):
        for child, module in list(parent._modules.items()):  # named_children gives a module of two names once
            if module is old:
                setattr(parent, child, new)
