"""E5: example-tied dropout, which confines memorization to neurons that can be removed.

Paper: example-tied dropout (Table 1, Figures 6 and 7). The first `p_gen` of a layer's channels are
generalization neurons, always on; of the others, the memorization neurons, each example owns a fixed
random subset, each with probability `p_mem`, and the others are off for it.
Deviations: the released code stores a float mask of [examples, channels, height, width] per layer,
reseeds the global generator for every example, shares one module between layers, edits activations
in place, and rescales when memorization neurons are dropped. Here a mask is a hash of (seed, layer,
example id, channel), computed on the device of the ids and stored nowhere, and rescaling is an option.

    tied = tie(model, after=["conv1", "conv2"], p_gen=0.2, p_mem=0.1, seed=0)
    logits = tied(images, ids=ids)              # training
    set_mode(tied, "dropped")
    logits = tied(images)                       # deployment; `pruning.prune` makes it smaller, too
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from memlib.config import check_probability
from memlib.errors import InputError, unknown
from memlib.places import check_channels_first, find_places, insert_after, remove_inserted
from memlib.seeds import stream_seed

MODES = ("tied", "scaled", "dropped")

# SplitMix64: its step (2^64 over the golden ratio) puts examples so far apart that no two of the first 2^40 share
# a counter; its finalizer folds high bits into low ones and multiplies, twice. One more factor spreads channels.
EXAMPLE_STEP = 0x9E3779B97F4A7C15 - 2**64
CHANNEL_FACTOR = 0xD1342543DE82EF95 - 2**64
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
LAST_SHIFT = 31


class ExampleTiedDropout(nn.Module):
    """The layer: feature maps [B, C, H, W], tokens [B, T, C] or vectors [B, C] in, the same shape out.

    name: of the layer within its model; layers of other names have other masks. In `mode` "tied" it needs the
    examples' ids, as an argument or handed in by the model that `tie` made. It has no parameters or buffers.

    Raises:
        InputError: p_gen or p_mem lies outside (0, 1]; in `forward`: ids are missing or not int64 [B], or there
            are too few channels for one generalization neuron.
    """

    ids: Tensor | None

    def __init__(self, *, p_gen: float = 0.2, p_mem: float = 0.1, seed: int = 0, name: str = "") -> None:
        super().__init__()
        check_probability("p_gen", p_gen)
        check_probability("p_mem", p_mem)
        self.p_gen, self.p_mem, self.seed, self.name = p_gen, p_mem, seed, name
        self.key = stream_seed(seed, f"example_tied_dropout/{name}")
        self.mode = "tied"
        self.rescale = False
        self.ids = None  # of the batch in progress

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the activations with the gates of the current mode on their channels."""
        if self.mode != "tied":
            return gate_channels(x, self._gates_of_all(x))
        ids = self.ids if ids is None else ids
        if ids is None:
            raise InputError(
                f"example-tied dropout {self.name!r} is in mode 'tied' but was given no example ids; call the model "
                "with ids=..., or set_mode(model, 'scaled') or 'dropped' where there are none."
            )
        if ids.dtype != torch.int64 or ids.shape != x.shape[:1]:
            raise InputError(
                f"example-tied dropout {self.name!r} was given ids of type {ids.dtype} and shape {tuple(ids.shape)} "
                f"for activations of shape {tuple(x.shape)}; give one int64 id an example, shape ({x.shape[0]},)."
            )
        channels = x.shape[channel_axis(x)]
        kept = generalization_neurons(channels, self.p_gen, layer=self.name)
        mask = active_channels(ids, channels, kept=kept, p_mem=self.p_mem, key=self.key)
        return gate_channels(x, mask.to(x.dtype))

    def extra_repr(self) -> str:
        """Return the settings, for printing a model."""
        return f"{self.name!r}, p_gen={self.p_gen}, p_mem={self.p_mem}, seed={self.seed}, mode={self.mode!r}"

    def _gates_of_all(self, x: Tensor) -> Tensor:
        """Return gates [1, C] that are the same for every example: mode `scaled` or `dropped`."""
        channels = x.shape[channel_axis(x)]
        kept = generalization_neurons(channels, self.p_gen, layer=self.name)
        leading = torch.arange(channels, device=x.device) < kept
        on, off = (1.0, self.p_mem) if self.mode == "scaled" else (self.rescaling, 0.0)
        return torch.where(leading, on, off).to(x.dtype)[None]

    @property
    def rescaling(self) -> float:
        """Return the factor on generalization neurons in mode `dropped`: the release's with `rescale`, else 1."""
        return (self.p_gen + self.p_mem) / self.p_gen if self.rescale else 1.0


def active_channels(
    ids: Int64[Tensor, " b"], channels: int, *, kept: int, p_mem: float, key: int
) -> Bool[Tensor, "b {channels}"]:
    """Return which channels are on for each example: the first `kept`, and those of the others that it owns.

    A pure function: the same on every device and in every process, whatever the batch. `key` is 63 bits that
    name the layer and the seed; ids are any int64.
    """
    channel = torch.arange(channels, device=ids.device)
    # No large factor on `channel` alone: torch.compile folds it into an index and loses the wrap-around.
    hashed = _mix(((ids * EXAMPLE_STEP + key)[:, None] + channel) * CHANNEL_FACTOR)
    # The hash is uniform over all int64, so a share p_mem of it lies at or below this.
    limit = max(int(p_mem * 2**64), 1) - 1 - 2**63
    return (hashed <= limit) | (channel < kept)


def generalization_neurons(channels: int, p_gen: float, *, layer: str) -> int:
    """Return how many of a layer's channels are generalization neurons: round(p_gen * channels).

    Raises:
        InputError: that is none; names the smallest width that has one.
    """
    kept = round(p_gen * channels)
    if kept < 1:
        widths = itertools.count(max(1, math.floor(0.5 / p_gen)))
        smallest = next(width for width in widths if round(p_gen * width) >= 1)
        raise InputError(
            f"layer {layer!r} has {channels} channels, too few for a generalization neuron at p_gen {p_gen}; "
            f"make it at least {smallest} wide, or raise p_gen."
        )
    return kept


def gate_channels(x: Float[Tensor, "b ..."], gates: Float[Tensor, "_ c"]) -> Float[Tensor, "b ..."]:
    """Return x with each channel multiplied by its gate; `gates` is [B, C], or [1, C] for all examples alike."""
    rows, channels = gates.shape
    shape = [rows, *[1] * (x.dim() - 1)]
    shape[channel_axis(x)] = channels
    return x * gates.view(shape)


def channel_axis(x: Tensor) -> int:
    """Return the axis of the channels: the last of vectors and tokens, the second of feature maps.

    Raises:
        InputError: x has fewer than two axes.
    """
    if x.dim() < 2:
        raise InputError(f"activations of shape {tuple(x.shape)} have no channels; give [B, C], [B, T, C] or maps.")
    return 2 if x.dim() == 3 else 1


def tie(
    model: nn.Module, after: Sequence[str] | None = None, *, p_gen: float = 0.2, p_mem: float = 0.1, seed: int = 0
) -> nn.Module:
    """Return a copy of the model with example-tied dropout after each of the modules or layer groups `after`.

    Called as `tied(images, ids=ids)` with one int64 id an example; parameters, buffers and layer groups keep
    their names. None takes ResNet-9's six places, of any other model every layer group but the last: name the
    activations of your own. The model is left unchanged.

    Raises:
        InputError: a place is unknown, p_gen or p_mem lies outside (0, 1], the model is tied already, or is one of
            timm's that keep channels last (Swin), where axis 1 is none of channels.
    """
    if dropout_layers(model):
        raise InputError("the model has example-tied dropout already; tie the model without it.")
    check_channels_first(model)
    places = find_places(model, after)
    layers = {place: ExampleTiedDropout(p_gen=p_gen, p_mem=p_mem, seed=seed, name=place) for place in places}
    tied = insert_after(model, layers)
    tied.register_forward_pre_hook(_hand_out_ids, with_kwargs=True)
    tied.register_forward_hook(_take_back_ids)
    return tied


def untie(tied: nn.Module) -> nn.Module:
    """Return a copy of a model that `tie` made without its dropout layers; the model is left unchanged."""
    model = remove_inserted(tied)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (_hand_out_ids, _take_back_ids):
                del hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def dropout_layers(model: nn.Module) -> list[ExampleTiedDropout]:
    """Return the model's example-tied dropout layers, in order of its modules."""
    return [module for module in model.modules() if isinstance(module, ExampleTiedDropout)]


def set_mode(model: nn.Module, mode: str, *, rescale: bool = False) -> None:
    """Set the mode of every example-tied dropout layer, in place.

    `rescale` multiplies the generalization neurons by (p_gen + p_mem) / p_gen in mode `dropped`, as the release does.

    Raises:
        InputError: the mode is unknown, or the model has no such layer.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    layers = dropout_layers(model)
    if not layers:
        raise InputError("the model has no example-tied dropout; make one with tie(model, after=...).")
    for layer in layers:
        layer.mode, layer.rescale = mode, rescale


@contextmanager
def dropout_mode(model: nn.Module, mode: str, *, rescale: bool = False) -> Iterator[None]:
    """Run a block with the model in a mode and give each layer its own back; raises like `set_mode`."""
    before = [(layer, layer.mode, layer.rescale) for layer in dropout_layers(model)]
    set_mode(model, mode, rescale=rescale)
    try:
        yield
    finally:
        for layer, mode_before, rescale_before in before:
            layer.mode, layer.rescale = mode_before, rescale_before


def check_ids(ids: Tensor) -> None:
    """Raise InputError unless ids are int64, one an example, from 0 upwards; waits for the device they are on."""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise InputError(
            f"example ids are of type {ids.dtype} and shape {tuple(ids.shape)}; give one int64 id an example."
        )
    if len(ids) and int(ids.min()) < 0:
        raise InputError(f"an example id is {int(ids.min())}; give ids from 0 to 2^63 - 1.")


def _mix(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Return a bijection of int64 under which close numbers come far apart."""
    for shift, factor in ROUNDS:
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, LAST_SHIFT)


def _shift_right(x: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # torch's shift repeats the sign


def _hand_out_ids(
    tied: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Be the forward pre-hook of a tied model: take the ids out of the call and give them to its layers."""
    ids = kwargs.get("ids")
    if ids is not None and ids.device.type == "cpu" and not _is_traced(ids):
        check_ids(ids)  # elsewhere the values cannot be looked at without waiting for them
    for layer in dropout_layers(tied):
        layer.ids = ids
    return args, {name: value for name, value in kwargs.items() if name != "ids"}


def _take_back_ids(tied: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
    for layer in dropout_layers(tied):
        layer.ids = None


def _is_traced(ids: Tensor) -> bool:
    """Return whether the ids have no values to look at: under torch.compile or a torch.func transform."""
    return torch.compiler.is_compiling() or is_functorch_wrapped_tensor(ids)
