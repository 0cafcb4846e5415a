"""What every data source gives: uint8 images, labels and stable example ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split.

    `ids` are the examples' positions in the source's own order of that split (of the whole source where its test
    split is held out of it), whatever subset is held here: they name an example in every result table.
    """

    images: UInt8[Tensor, "n c h w"] | Float[Tensor, "n c h w"]  # floating-point ones are a model's inputs as they are
    labels: Int64[Tensor, " n"]
    ids: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Int64[Tensor, " m"]) -> ImageSet:
        """Return the examples at `indices` (positions in this set, not ids), in that order."""
        return ImageSet(self.images[indices], self.labels[indices], self.ids[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of equally sized images; `class_names[k]` is the name of label k."""

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Return the number of classes K; labels lie in [0, K)."""
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """Return 32 hexadecimal digits that depend on every pixel, label and id."""
        digest = hashlib.blake2b(digest_size=16)
        for split in (self.train, self.test):
            for tensor in (split.images, split.labels, split.ids):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width
