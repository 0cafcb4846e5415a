"""A network by name, initialized from the run's seed."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn
from torchvision.models import resnet50

from memlib.config import ModelConfig
from memlib.errors import InputError, unknown
from memlib.models.resnet9 import ResNet9
from memlib.models.vit import ViT
from memlib.seeds import global_stream

NAMES = ("resnet9", "resnet50", "vit")
TIMM = "timm:"
LARGEST_SIDE_TRIED = 512  # pixels: how far the search for a large enough image goes


def check_model_name(name: str) -> None:
    """Raise InputError with the nearest match if `name` is no model; nothing is built."""
    if name.startswith(TIMM):
        if not timm.is_model(name.removeprefix(TIMM)):
            raise unknown("timm model", name.removeprefix(TIMM), timm.list_models())
    elif name not in NAMES:
        raise unknown("model", name, [*NAMES, "timm:NAME"])


def build_model(config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """Return the freshly initialized network on the CPU, in float32.

    `image_shape` is (channels, height, width). The global random stream is left as it was.

    Raises:
        InputError: the name is unknown, or the model cannot take images of this size.
    """
    check_model_name(config.name)
    check_image_size(config, image_shape=image_shape, num_classes=num_classes)
    with global_stream(seed, "initialization", device=torch.device("cpu")):
        return _construct(config, image_shape, num_classes)


def check_image_size(config: ModelConfig, *, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise InputError if the model cannot take images of this shape, naming the smallest square it can take.

    The network is built and run without memory or compute (torch's meta device).
    """
    reason = _shape_problem(config, image_shape, num_classes)
    if reason is None:
        return
    channels, height, width = image_shape
    larger = range(max(height, width) + 1, LARGEST_SIDE_TRIED + 1)
    fits = next((s for s in larger if _shape_problem(config, (channels, s, s), num_classes) is None), None)
    advice = f"set data.image_size to {fits} or more" if fits else "choose another model"
    raise InputError(f"images of {height} x {width} pixels do not fit model {config.name} ({reason}); {advice}.")


def _construct(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    if config.name == "resnet9":
        return ResNet9(in_channels=channels, num_classes=num_classes, width=config.width)
    if config.name == "vit":
        return ViT(in_channels=channels, num_classes=num_classes, image_size=(height, width))
    if config.name == "resnet50":
        model = resnet50(num_classes=num_classes)
        if channels != 3:
            model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        return model
    name = config.name.removeprefix(TIMM)
    pretrained = timm.get_pretrained_cfg(name)
    fixed: dict[str, Any] = {}
    if pretrained is not None and pretrained.fixed_input_size:
        fixed["img_size"] = (height, width)
    return timm.create_model(name, num_classes=num_classes, in_chans=channels, **fixed)


def _shape_problem(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> str | None:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            _construct(config, image_shape, num_classes)(torch.empty(2, *image_shape))
    except InputError:  # about the settings, not about the image
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
