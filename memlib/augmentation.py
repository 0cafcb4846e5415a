"""Augment uint8 images in batches, where they lie.

Paper: arXiv 2307.09542 names random crops with padding 4, horizontal flips and AutoAugment; its main
results use none of them.
Deviations: everything random is drawn once an epoch for every example (`draw_augmentation`) and
applied later (`augment`), so the image an example becomes depends on (seed, epoch, position) and not
on the batch it falls into. AutoAugment uses the CIFAR-10 policy for every data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional

from memlib.config import Augmentation

PADDING = 4  # black pixels on each side before the random crop
LEVELS = 10  # AutoAugment's magnitudes are levels 0 to 9
NOT_APPLIED = -1

# The CIFAR-10 policy of AutoAugment (arXiv 1805.09501): 25 pairs of (operation, probability, level).
POLICY = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)
OPERATIONS = tuple(sorted({(name, level or 0) for pair in POLICY for name, _, level in pair}))

# Operations whose magnitude has a random sign, with the magnitude of level 9.
SIGNED = {
    "ShearY": 0.3,
    "TranslateX": 150 / 331,  # of the width
    "TranslateY": 150 / 331,  # of the height
    "Rotate": 30.0,  # degrees
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}


@dataclass(frozen=True, eq=False)
class AugmentationDraws:
    """Everything random about the augmentation of n examples; None for a step that is not wanted.

    crop: rows and columns, from 0 to 8, at which the crop of the padded image begins.
    flip: whether the image is mirrored left to right.
    operations: AutoAugment's two operations, 2 * (index into OPERATIONS) + (1 if the magnitude is
        negative), or NOT_APPLIED.
    """

    crop: Int64[Tensor, "n 2"] | None
    flip: Bool[Tensor, " n"] | None
    operations: Int64[Tensor, "n 2"] | None

    def take(self, indices: Int64[Tensor, " m"]) -> AugmentationDraws:
        """Return the draws of the examples at `indices`, in that order."""
        return self._map(lambda draws: draws[indices])

    def to(self, device: torch.device) -> AugmentationDraws:
        """Return the draws on `device`."""
        return self._map(lambda draws: draws.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> AugmentationDraws:
        fields = (self.crop, self.flip, self.operations)
        return AugmentationDraws(*(None if draws is None else change(draws) for draws in fields))


def draw_augmentation(n: int, steps: tuple[Augmentation, ...], *, generator: torch.Generator) -> AugmentationDraws:
    """Return one draw of `steps` for each of n examples.

    The draws of a step do not depend on which other steps are wanted, nor on their order.
    """
    place = {"generator": generator, "device": generator.device}
    crop = torch.randint(0, 2 * PADDING + 1, (n, 2), **place)
    flip = torch.randint(0, 2, (n,), **place).bool()
    policy = torch.randint(0, len(POLICY), (n,), **place)
    chances = torch.rand(n, 2, **place)
    negative = torch.randint(0, 2, (n, 2), **place)
    return AugmentationDraws(
        crop=crop if "crop" in steps else None,
        flip=flip if "flip" in steps else None,
        operations=_choose_operations(policy, chances, negative) if "autoaugment" in steps else None,
    )


def augment(images: UInt8[Tensor, "b c h w"], draws: AugmentationDraws) -> UInt8[Tensor, "b c h w"]:
    """Return the images cropped, flipped and auto-augmented (in that order) as drawn; the input is left unchanged.

    `draws` are those of the images, in order. Operations on colour leave grey images as they are.
    """
    result = images.clone()
    if draws.crop is not None:
        result = _crop(result, draws.crop)
    if draws.flip is not None:
        result = torch.where(draws.flip[:, None, None, None], result.flip(3), result)
    if draws.operations is not None:
        for slot in range(2):
            result = _apply_operations(result, draws.operations[:, slot])
    return result


def _choose_operations(
    policy: Int64[Tensor, " n"], chances: Tensor, negative: Int64[Tensor, "n 2"]
) -> Int64[Tensor, "n 2"]:
    index = [[OPERATIONS.index((name, level or 0)) for name, _, level in pair] for pair in POLICY]
    probability = [[p for _, p, _ in pair] for pair in POLICY]
    signed = [[int(name in SIGNED) for name, _, _ in pair] for pair in POLICY]
    device = policy.device
    chosen = 2 * torch.tensor(index, device=device)[policy] + negative * torch.tensor(signed, device=device)[policy]
    applied = chances < torch.tensor(probability, device=device)[policy]
    return chosen.where(applied, torch.full_like(chosen, NOT_APPLIED))


def _crop(images: UInt8[Tensor, "b c h w"], begin: Int64[Tensor, "b 2"]) -> UInt8[Tensor, "b c h w"]:
    b, c, h, w = images.shape
    padded = torch.nn.functional.pad(images, [PADDING] * 4)
    rows = begin[:, 0, None] + torch.arange(h, device=images.device)
    columns = begin[:, 1, None] + torch.arange(w, device=images.device)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    return padded.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, c, -1)).view(b, c, h, w)


def _apply_operations(images: UInt8[Tensor, "b c h w"], chosen: Int64[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
    result = images.clone()
    for number in chosen.unique().tolist():
        if number != NOT_APPLIED:
            where = (chosen == number).nonzero().squeeze(1)
            name, level = OPERATIONS[number // 2]
            result[where] = _apply(images[where], name, level, negative=number % 2 == 1)
    return result


def _apply(images: UInt8[Tensor, "b c h w"], name: str, level: int, *, negative: bool) -> UInt8[Tensor, "b c h w"]:
    if name not in SIGNED:
        return _apply_unsigned(images, name, level)
    side = {"TranslateX": images.shape[3], "TranslateY": images.shape[2]}.get(name, 1)
    magnitude = _magnitude(0.0, SIGNED[name] * side, level) * (-1 if negative else 1)
    enhance = {
        "Brightness": functional.adjust_brightness,
        "Color": functional.adjust_saturation,
        "Contrast": functional.adjust_contrast,
        "Sharpness": functional.adjust_sharpness,
    }
    if name in enhance:
        return enhance[name](images, 1 + magnitude)
    if name == "Rotate":
        return functional.rotate(images, magnitude)
    if name == "ShearY":
        shear = [0.0, math.degrees(math.atan(magnitude))]
        return functional.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
    shift = float(int(magnitude))  # whole pixels
    translate = [shift, 0.0] if name == "TranslateX" else [0.0, shift]
    return functional.affine(images, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])


def _apply_unsigned(images: UInt8[Tensor, "b c h w"], name: str, level: int) -> UInt8[Tensor, "b c h w"]:
    if name == "Posterize":
        return functional.posterize(images, bits=round(8 - 4 * level / (LEVELS - 1)))
    if name == "Solarize":
        return functional.solarize(images, threshold=255 * _magnitude(1.0, 0.0, level))
    plain = {"AutoContrast": functional.autocontrast, "Equalize": functional.equalize, "Invert": functional.invert}
    return plain[name](images)


def _magnitude(first: float, last: float, level: int) -> float:
    return float(torch.linspace(first, last, LEVELS)[level])  # float32, as torchvision computes it
