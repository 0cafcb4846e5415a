"""Places: the modules of a network after which a layer is inserted, and the insertion.

The inserted layer becomes a child of the module it follows, so no parameter or buffer changes its
name, a state dictionary fits both networks, and layer groups stay what they were.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from memlib.errors import InputError, unknown
from memlib.grouping import LayerGroups, layer_groups

INSERTED = "inserted_dropout"  # name of the child that an inserted layer is


def find_places(model: nn.Module, after: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the modules that `after` means: module names, or layer groups that are one module.

    None takes the places the model declares (`dropout_places`), else every layer group but the last that is
    one module.

    Raises:
        InputError: a name is unknown, given twice, or a layer group that is no single module; or nothing is left.
    """
    modules = dict(model.named_modules())
    groups = layer_groups(model)
    if after is None:
        declared: Callable[[], Sequence[str]] | None = getattr(model, "dropout_places", None)
        stages = (_module_of(group, groups) for group in groups.names[:-1])
        after = declared() if declared is not None else [stage for stage in stages if stage in modules and stage]
    places = tuple(_resolve(name, modules, groups) for name in after)
    if not places:
        raise InputError("there is no place to insert dropout; name modules of the model, e.g. after=['conv1'].")
    twice = sorted({place for place in places if places.count(place) > 1})
    if twice:
        raise InputError(f"after names {twice} more than once; give each place once.")
    return places


def check_channels_first(model: nn.Module) -> None:
    """Raise InputError for one of timm's models that keep channels last (Swin): axis 1 of four is none of channels."""
    if getattr(model, "output_fmt", "") == "NHWC":
        raise InputError(
            f"{type(model).__name__} keeps its feature maps as [batch, height, width, channels]; dropout of channels "
            "takes axis 1 of four for them, so it cannot be inserted there."
        )


def insert_after(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of the model in which each layer is applied to the output of the module it is keyed by.

    The model is left unchanged; the layers are used as they are.

    Raises:
        InputError: a module has a layer inserted already, or is a container whose own `forward` would not run it.
    """
    model = copy.deepcopy(model)
    for name, layer in layers.items():
        place = model.get_submodule(name)
        if hasattr(place, INSERTED):
            raise InputError(f"after {name!r} there is an inserted dropout already; insert into the model without.")
        if isinstance(place, nn.Sequential):
            if type(place).forward is not nn.Sequential.forward:
                raise InputError(
                    f"{name!r} is a {type(place).__name__}, a sequence with a forward of its own; name a module inside."
                )
        elif isinstance(place, nn.ModuleList | nn.ModuleDict):
            raise InputError(f"{name!r} is a list of modules and has no output; name a module inside.")
        else:
            place.register_forward_hook(_apply_inserted)
        place.add_module(INSERTED, layer)  # a sequence runs it by itself
    return model


def remove_inserted(model: nn.Module) -> nn.Module:
    """Return a copy of the model without the layers that `insert_after` put in; the model is left unchanged."""
    model = copy.deepcopy(model)
    for place in list(model.modules()):
        if hasattr(place, INSERTED):
            delattr(place, INSERTED)
        for key, hook in list(place._forward_hooks.items()):
            if hook is _apply_inserted:
                del place._forward_hooks[key]
    return model


def _apply_inserted(place: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
    """Be the forward hook of a place. It holds no state: copies and replicas use their own layer."""
    layer = getattr(place, INSERTED)
    if isinstance(output, tuple | list | dict):
        raise InputError(
            f"the {type(place).__name__} before an inserted dropout gives a {type(output).__name__}; "
            "name a module that gives one tensor."
        )
    return layer(output)


def _resolve(name: str, modules: Mapping[str, nn.Module], groups: LayerGroups) -> str:
    if name in modules and name:
        return name
    if name not in groups.names:
        raise unknown("place", name, {*groups.names, *difflib.get_close_matches(name, modules)})
    module = _module_of(name, groups)
    if module not in modules or not module:
        raise InputError(f"layer group {name!r} is not one module, so nothing comes after it; name a module instead.")
    return module


def _module_of(group: str, groups: LayerGroups) -> str:
    """Return the module all parameters of a layer group lie in, '' if there is none."""
    return ".".join(os.path.commonprefix([name.split(".")[:-1] for name in groups.parameters[group]]))
