"""The controls of example-tied dropout, in the same places of the same network.

Paper: example-tied dropout is compared with no dropout and with standard dropout.
Deviations: two controls more. Channel dropout drops whole channels anew at every step, as many as
example-tied dropout, tied to nothing; in the fixed sparse network the channels that `dropped` would
remove are off from the start for everyone, so that "it is just less capacity" can be ruled out.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlib.config import DropoutConfig
from memlib.example_tied_dropout import (
    channel_axis,
    dropout_layers,
    gate_channels,
    generalization_neurons,
    set_mode,
    tie,
)
from memlib.places import check_channels_first, find_places, insert_after


class ChannelDropout(nn.Module):
    """Drop whole channels of maps, tokens or vectors in training, the others scaled by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of each example's channels at zero; in evaluation mode x itself."""
        if not self.training:
            return x
        return gate_channels(x, F.dropout(x.new_ones(len(x), x.shape[channel_axis(x)]), self.p))


class SparseChannels(nn.Module):
    """Only the first `p_gen` of the channels are ever on, in training and evaluation; `name` is for errors."""

    def __init__(self, *, p_gen: float, name: str) -> None:
        super().__init__()
        self.p_gen, self.name = p_gen, name

    def forward(self, x: Tensor) -> Tensor:
        """Return x with all other channels at zero."""
        channels = x.shape[channel_axis(x)]
        kept = generalization_neurons(channels, self.p_gen, layer=self.name)
        return gate_channels(x, (torch.arange(channels, device=x.device) < kept).to(x.dtype)[None])


def insert_dropout(model: nn.Module, config: DropoutConfig, *, seed: int) -> nn.Module:
    """Return a copy of the model with the configured dropout inserted; the model itself for kind `none`.

    Raises:
        InputError: a place is unknown, or there is none.
    """
    if config.kind == "none":
        return model
    after = config.after or None
    if config.kind == "example_tied":
        return tie(model, after, p_gen=config.p_gen, p_mem=config.p_mem, seed=seed)
    if config.kind != "standard":
        check_channels_first(model)
    return insert_after(model, {place: _control(config, place) for place in find_places(model, after)})


def check_widths(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Raise InputError where a layer is too narrow for its dropout; nothing is computed (torch's meta device)."""
    trial = copy.deepcopy(model).to("meta").eval()
    if dropout_layers(trial):
        set_mode(trial, "dropped")
    with torch.no_grad():
        trial(torch.empty(2, *image_shape, device="meta"))


def _control(config: DropoutConfig, place: str) -> nn.Module:
    if config.kind == "sparse":
        return SparseChannels(p_gen=config.p_gen, name=place)
    return nn.Dropout(config.dropped_share) if config.kind == "standard" else ChannelDropout(config.dropped_share)
