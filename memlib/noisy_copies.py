"""Noisy copies of an example, over which its logits are averaged to make gradients and predictions robust.

Paper: the neuron-level experiments (Figure 5): 5 copies, each with Gaussian noise of 1 % of the input's norm.
Deviations: the noise is a function of (seed, example id, copy), so an example has the same copies in every
step and whatever else is computed beside it; the released code draws anew for every gradient.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from memlib.batches import model_inputs
from memlib.datasets import ImageSet
from memlib.seeds import stream


def noisy_copies(
    examples: ImageSet, *, copies: int, noise: float, seed: int, device: torch.device
) -> Float32[Tensor, "m c h w"]:
    """Return model inputs, copy by copy (the n examples once, then again, ...), on `device`.

    Each copy is the model's input (a uint8 image normalized as in training) plus independent Gaussian noise whose
    expected squared norm is (`noise` times the input's norm) squared.
    """
    images = model_inputs(examples.images, device)
    norms = images.flatten(1).norm(dim=1) * (noise / math.sqrt(images[0].numel()))
    shape = images.shape[1:]
    noisy = []
    for copy in range(copies):
        streams = (stream(seed, "critical_units_noise", example, copy) for example in examples.ids.tolist())
        drawn = torch.stack([torch.randn(shape, generator=generator) for generator in streams]).to(device)
        noisy.append(images + norms[:, None, None, None] * drawn)
    return torch.cat(noisy).contiguous(memory_format=torch.channels_last)


def mean_over_copies(logits: Float[Tensor, "m k"], copies: int) -> Float[Tensor, "n k"]:
    """Return each example's logits averaged over its copies, for a batch ordered as `noisy_copies` gives it."""
    return logits.unflatten(0, (copies, -1)).mean(dim=0)
