"""Layer groups: the parts of a network that the layer-level experiments treat as one.

A group owns parameters and buffers; the groups of a model are a partition of both, in order of
depth (of those buffers that its state dictionary holds: others are computed, not learned). A BatchNorm's
running statistics belong to the group of its weight.

Paper: the units of its layer-level experiments. ResNet-9: 8 convolution blocks and the classifier.
ResNet-50: stem, layer1..layer4, classifier. ViT: patch embedding, one group a transformer block, head.
Any other model: timm's own coarse stages where it declares them, else its top-level modules.
Deviations: the released code types the names by hand, puts one ViT tensor in two groups and no
buffer in any.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from timm.models import group_parameters
from torch import nn
from torchvision.models import ResNet

from memlib.errors import InputError, unknown

RESNET_PREFIXES = {
    "stem": ["conv1", "bn1"],
    **{f"layer{i}": [f"layer{i}"] for i in (1, 2, 3, 4)},
    "classifier": ["fc"],
}
WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


@dataclass(frozen=True)
class LayerGroups:
    """Group name -> names of its parameters and of its buffers, in order of depth."""

    parameters: Mapping[str, tuple[str, ...]]
    buffers: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the group names in order of depth."""
        return tuple(self.parameters)


def layer_groups(model: nn.Module, prefixes: Mapping[str, Sequence[str]] | None = None) -> LayerGroups:
    """Return the layer groups of a model, or those a user names by module-name prefixes.

    `prefixes` maps a group's name to prefixes such as `["conv1", "layer1.0"]`; a tensor belongs to
    the group that names the longest prefix of its name.

    Raises:
        InputError: a parameter lies in no group or in two, a prefix matches nothing, or the model has no parameters;
            or it is the wrapper of another, and no prefixes are given.
    """
    names = [name for name, _ in model.named_parameters()]
    if not names:
        raise InputError(f"model {type(model).__name__} has no parameters, so it has no layer groups.")
    if prefixes is None:
        _check_unwrapped(model)
        parameters = _declared_groups(model, names)
    else:
        parameters = _groups_by_prefix(names, prefixes)
    owner = {name: group for group, members in parameters.items() for name in members}
    buffers: dict[str, list[str]] = {group: [] for group in parameters}
    stored = model.state_dict().keys()
    for buffer, _ in model.named_buffers():
        if buffer in stored:
            buffers[owner[_closest(buffer, names)]].append(buffer)
    return LayerGroups(parameters, {group: tuple(members) for group, members in buffers.items()})


def _check_unwrapped(model: nn.Module) -> None:
    kind = type(model).__name__
    if kind in WRAPPERS:
        raise InputError(
            f"the model is wrapped in {kind}, all of which is one layer group; give model.{WRAPPERS[kind]}."
        )


def check_groups(chosen: Iterable[str], names: Sequence[str]) -> None:
    """Raise InputError listing the layer groups `names` if one of `chosen` is not among them."""
    for name in chosen:
        if name not in names:
            raise unknown("layer group", name, names)


def _declared_groups(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    declared: Callable[[], dict[str, list[str]]] | None = getattr(model, "layer_group_prefixes", None)
    if declared is not None:
        return _groups_by_prefix(names, declared())
    if isinstance(model, ResNet):
        return _groups_by_prefix(names, RESNET_PREFIXES)
    stages = _timm_stages(model)
    if stages is not None:
        return _name_stages(stages)
    return _groups_by_prefix(names, {name: [name] for name in dict.fromkeys(n.split(".")[0] for n in names)})


def _timm_stages(model: nn.Module) -> list[list[str]] | None:
    """Return the parameter names of timm's coarse stages, None where the model declares none."""
    matcher: Callable[..., dict] | None = getattr(model, "group_matcher", None)
    if matcher is None:
        return None
    try:
        return list(group_parameters(model, matcher(coarse=True)).values())
    except (AssertionError, NotImplementedError):  # "coarse grouping is not implemented for this model"
        return None


def _groups_by_prefix(names: Iterable[str], prefixes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {group: [] for group in prefixes}
    for name in names:
        groups[_group_of(name, prefixes)].append(name)
    empty = [group for group, members in groups.items() if not members]
    if empty:
        raise InputError(
            f"layer groups {empty} match no parameter; check their prefixes against model.named_parameters()."
        )
    return {group: tuple(members) for group, members in groups.items()}


def _group_of(name: str, prefixes: Mapping[str, Sequence[str]]) -> str:
    matches = [(len(p), group) for group, ps in prefixes.items() for p in ps if f"{name}.".startswith(f"{p}.")]
    best = max(matches, default=(0, ""))[0]
    owners = [group for length, group in matches if length == best]
    if len(owners) != 1:
        where = f"in groups {owners}" if owners else "in no group"
        raise InputError(f"parameter {name!r} lies {where}; give each parameter exactly one layer group.")
    return owners[0]


def _name_stages(stages: list[list[str]]) -> dict[str, tuple[str, ...]]:
    """Name each of timm's numbered stages by the module it consists of; mixed ends are `stem` and `head`."""
    named: dict[str, tuple[str, ...]] = {}
    for index, members in enumerate(stages):
        prefix = _common_module(members)
        if not prefix and 0 < index < len(stages) - 1:
            root = members[0].split(".")[0]
            prefix = _common_module([m for m in members if m.split(".")[0] == root])
        name = prefix or ("stem" if index == 0 else "head" if index == len(stages) - 1 else f"stage{index}")
        named[f"{name}#{index}" if name in named else name] = tuple(members)
    return named


def _common_module(names: list[str]) -> str:
    parts = [name.split(".")[:-1] or [name] for name in names]
    return ".".join(os.path.commonprefix(parts))


def _closest(buffer: str, names: list[str]) -> str:
    parts = buffer.split(".")
    return max(names, key=lambda name: len(os.path.commonprefix([parts, name.split(".")])))
