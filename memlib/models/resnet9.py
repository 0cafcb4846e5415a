"""ResNet-9, the paper's small convolutional network.

Paper: the experimental setting and the released code's model:
conv3x3 64 - conv5x5/2 128 - residual(2 x conv3x3 128) - conv3x3 256 - maxpool 2 -
residual(2 x conv3x3 256) - conv3x3 128 without padding - global max pool - linear without
bias - logits times 0.2. Every convolution is convolution, BatchNorm, ReLU, without bias.
Deviations: a width factor scales all channels.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from memlib.errors import InputError

LOGIT_SCALE = 0.2


class ConvBlock(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()


class Residual(nn.Module):
    """Two convolution blocks of equal width, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.second = ConvBlock(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `x` plus what the two blocks make of it."""
        return x + self.second(self.first(x))


class ResNet9(nn.Module):
    """Eight convolution blocks and a classifier; images of at least 11 x 11 pixels.

    `width` multiplies every channel count (64, 128, 256); each must stay at least 1.
    """

    def __init__(self, *, in_channels: int, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        narrow, middle, wide = (round(c * width) for c in (64, 128, 256))
        if narrow < 1:
            raise InputError(f"model.width is {width}; give at least {1 / 64} so that every layer keeps a channel.")
        self.conv1 = ConvBlock(in_channels, narrow)
        self.conv2 = ConvBlock(narrow, middle, kernel=5, stride=2, padding=2)
        self.residual1 = Residual(middle)
        self.conv3 = ConvBlock(middle, wide)
        self.pool = nn.MaxPool2d(2)
        self.residual2 = Residual(wide)
        self.conv4 = ConvBlock(wide, middle, padding=0)
        self.classifier = nn.Linear(middle, num_classes, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return the logits."""
        x = self.residual1(self.conv2(self.conv1(x)))
        x = self.residual2(self.pool(self.conv3(x)))
        return self.classifier(self.conv4(x).amax(dim=(2, 3))) * LOGIT_SCALE

    def layer_group_prefixes(self) -> dict[str, list[str]]:
        """Return the specification's nine groups as module-name prefixes, in order of depth."""
        blocks = ["conv1", "conv2", "residual1.first", "residual1.second", "conv3"]
        blocks += ["residual2.first", "residual2.second", "conv4", "classifier"]
        return {name: [name] for name in blocks}

    def dropout_places(self) -> list[str]:
        """Return the specification's six modules after which dropout goes, in order of depth."""
        return ["conv1", "conv2", "residual1", "conv3", "residual2", "conv4"]
