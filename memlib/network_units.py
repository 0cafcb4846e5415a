"""The units of a network: what can be removed from it one by one, and where a gate removes it.

A unit is a convolution's output channel or a linear layer's output feature; the classifier's logits
are no units. Of a vision transformer: the MLP's hidden features and each attention head's output
features, which are the rows of the value part of `qkv`. Of any other network: its convolutions and
linear layers except the classifier.

Paper: the neuron-level experiments (Figure 5), which remove a unit by setting its filter to zero.
Deviations: removal at the activation is an option; the released code knows ResNet-9 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from memlib.errors import InputError
from memlib.evaluation import evaluation_mode
from memlib.experiments import Removal
from memlib.module_calls import Calls, observe_calls

ACTIVATION_MODULES = ("torch.nn.modules.activation", "timm.layers.activations")


@dataclass(frozen=True)
class UnitLayer:
    """One layer's units: output channels (or features) `first` to `first + n_units - 1` of module `name`.

    `site` is the module whose output a gate multiplies along dimension `dim`. A layer is `fused` where it is
    a plain convolution whose BatchNorm `norm` (if any) and ReLU directly follow, so that all three can be
    computed as one; `own_relu` is that ReLU's module unless several layers share it.
    """

    name: str
    first: int
    n_units: int
    site: str
    dim: Literal[1, -1]
    called_once: bool
    one_row_an_image: bool  # does the output's first dimension count the images, so that each can have its gates?
    fused: bool = False
    norm: str | None = None
    own_relu: str | None = None


@dataclass(frozen=True)
class NetworkUnits:
    """All units of a network, layer by layer in order of depth (of the first call in a forward pass).

    A gate vector has one entry a unit, the layers' one after the other. `bytes_per_image` is what all
    modules' outputs take for one image in the precision observed: a measure of memory, not a bound.
    """

    layers: tuple[UnitLayer, ...]
    removal: Removal
    bytes_per_image: int

    @property
    def one_row_an_image(self) -> bool:
        """Return whether the images of a batch can have different gates."""
        return all(layer.one_row_an_image for layer in self.layers)

    @property
    def n_units(self) -> int:
        """Return the number of units of all layers."""
        return sum(layer.n_units for layer in self.layers)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (layer index, unit) of an entry of the gate vector; the unit counts within the layer's units."""
        for index, layer in enumerate(self.layers):
            if position < layer.n_units:
                return index, position
            position -= layer.n_units
        raise IndexError(position)

    def position(self, layer_index: int, unit: int) -> int:
        """Return the entry of the gate vector for a unit of a layer: the inverse of `locate`."""
        return sum(layer.n_units for layer in self.layers[:layer_index]) + unit


def network_units(model: nn.Module, inputs: Float[Tensor, "b c h w"], *, removal: Removal = "filter") -> NetworkUnits:
    """Return the units of a network, found by running it once on `inputs` (one image is enough).

    removal: `filter` sets the unit's filter (weight row) to zero and leaves its bias and the BatchNorm
    behind it; `activation` makes the unit zero after the BatchNorm and the activation that directly follow
    its layer, where they do, else at the layer's output. The model is left as it was.

    Raises:
        InputError: the model has no units, uses a layer's weight without calling the layer, or (for
            `activation`) applies an activation that is not a module of its own.
    """
    with evaluation_mode(model), torch.no_grad():
        calls = observe_calls(model, inputs)
    modules = dict(model.named_modules())
    names = _unit_modules(model, modules, calls)
    layers = [_describe(name, modules, calls, removal) for name in names]
    if not layers:
        raise InputError(
            f"model {type(model).__name__} has no units: it calls no convolution or linear layer besides its "
            "classifier; give a network with hidden layers."
        )
    return NetworkUnits(tuple(layers), removal, calls.output_bytes // len(inputs))


def _unit_modules(model: nn.Module, modules: dict[str, nn.Module], calls: Calls) -> list[str]:
    """Return the names of the modules that hold units, in order of their first call."""
    if isinstance(model, VisionTransformer) and all(_is_plain(block) for block in model.blocks):
        return [f"blocks.{i}.{part}" for i in range(len(model.blocks)) for part in ("attn.qkv", "mlp.fc1")]
    named = {name for name, module in modules.items() if isinstance(module, _ConvNd | nn.Linear)}
    called = [name for name in dict.fromkeys(calls.modules) if name in named]
    for name in sorted(named - set(called)):
        if calls.passed_to_a_function(cast(Tensor, modules[name].weight)):
            raise InputError(
                f"layer {name!r} cannot be gated: {type(model).__name__} uses its weight without calling it; "
                "rewrite the model so that it calls the layer."
            )
    classifiers = _classifiers(model, modules) or called[-1:]
    return [name for name in called if name not in classifiers]


def _is_plain(block: Any) -> bool:  # noqa: ANN401  timm's blocks share no class
    """Return whether a transformer block has timm's standard attention and an MLP with one hidden layer."""
    return type(getattr(block, "attn", None)) is Attention and isinstance(
        getattr(getattr(block, "mlp", None), "fc1", None), nn.Linear
    )


def _classifiers(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of what timm declares as the classifier; empty for a model that declares none."""
    declared = getattr(model, "get_classifier", lambda: None)()
    heads = declared if isinstance(declared, tuple | list) else (declared,)
    inside = {id(module) for head in heads if head is not None for module in head.modules()}
    return [
        name for name, module in modules.items() if id(module) in inside and isinstance(module, _ConvNd | nn.Linear)
    ]


def _describe(name: str, modules: dict[str, nn.Module], calls: Calls, removal: Removal) -> UnitLayer:
    module = modules[name]
    is_convolution = isinstance(module, _ConvNd)
    n_units, first = module.out_channels if is_convolution else cast(nn.Linear, module).out_features, 0
    if name.endswith(".attn.qkv") and type(modules[name.removesuffix(".qkv")]) is Attention:
        n_units //= 3
        first = 2 * n_units  # rows of queries, then keys, then values
    norm, activation = _followers(name, modules, calls)
    fused = _is_fusable(name, norm, activation, modules, calls)
    site = name if removal == "filter" else _activation_site(name, norm, activation, modules, calls)
    output = calls.output_of(site)
    return UnitLayer(
        name=name,
        first=first,
        n_units=n_units,
        site=site,
        dim=1 if is_convolution else -1,
        called_once=calls.modules.count(name) == 1,
        one_row_an_image=output is not None and output.dim() > 1 and len(output) == calls.n_images,
        fused=fused,
        norm=norm if fused else None,
        own_relu=activation if fused and activation is not None and calls.modules.count(activation) == 1 else None,
    )


def _followers(name: str, modules: dict[str, nn.Module], calls: Calls) -> tuple[str | None, str | None]:
    """Return the BatchNorm and the activation module that directly follow a layer's first call, None for none."""
    norm, index = None, calls.modules.index(name)
    after = calls.consumer(index)
    if after is not None and isinstance(modules[calls.modules[after]], _BatchNorm):
        norm, index = calls.modules[after], after
        after = calls.consumer(index)
    if after is not None and type(modules[calls.modules[after]]).__module__ in ACTIVATION_MODULES:
        return norm, calls.modules[after]
    return norm, None


def _activation_site(
    name: str, norm: str | None, activation: str | None, modules: dict[str, nn.Module], calls: Calls
) -> str:
    """Return the module whose output is the unit's activation.

    A gate before a ReLU is a gate after it (g relu(x) = relu(g x) for g >= 0, slope included), so a
    ReLU that many layers share, as torchvision's ResNets do, is no obstacle.
    """
    behind = norm or name
    if activation is None:
        function = calls.activation_function(calls.output_of(behind))
        if function not in (None, "relu", "relu_"):
            raise InputError(
                f"layer {name!r} is followed by the function {function}, which cannot be gated; use a module for "
                "the activation, or removal='filter'."
            )
        site = behind
    else:
        site = behind if type(modules[activation]) is nn.ReLU else activation
    if site != name and calls.modules.count(site) != 1:
        raise InputError(
            f"layer {name!r}: module {site!r} behind it is called {calls.modules.count(site)} times in a forward "
            "pass, so its output is not this layer's alone; use removal='filter'."
        )
    return site


def _is_fusable(
    name: str, norm: str | None, activation: str | None, modules: dict[str, nn.Module], calls: Calls
) -> bool:
    if activation is None or type(modules[activation]) is not nn.ReLU or calls.modules.count(name) != 1:
        return False
    module = modules[name]
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if norm is not None:
        batchnorm = modules[norm]
        plain &= type(batchnorm) is nn.BatchNorm2d and batchnorm.running_var is not None
        plain &= calls.modules.count(norm) == 1
    # what a ReLU of this layer alone returns must stay as it is until the backward pass
    shared = calls.modules.count(activation) > 1
    return plain and (shared or not calls.changed_in_place(calls.output_of(activation)))
