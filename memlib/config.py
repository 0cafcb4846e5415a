"""The settings of a run: frozen, checked, named as the field names them; no torch.

A run is identified by what can move its numbers. `run_id` hashes the settings that differ from
the defaults below, so a setting added later with a default that means "as before" keeps every
finished run valid; for the same reason a default here is part of the result format and is never
changed. Which checkpoints are kept moves no number and is left out of the identity.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from memlib.errors import InputError, unknown

Augmentation = Literal["crop", "flip", "autoaugment"]
DropoutKind = Literal["none", "example_tied", "standard", "channel", "sparse"]
NoiseKind = Literal["symmetric", "asymmetric"]
Precision = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["cosine", "triangular", "one_cycle"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images.

    name: `mnist`, `cifar10`, `svhn`, `digits`, `folder:PATH` or `parquet:PATH`.
    limit: number of training images, a class-balanced subset; None for all.
    image_size: side in pixels to scale the images to; None leaves them as they are.
    holdout: share of the training set, drawn after label noise, that is not trained on but judged as split
        `validation`; None for none.
    seed: of every draw among the examples: the subset, the wrong labels, what is held out, the folds, and the order in
        which experiments take examples. None for the run's seed; given, runs of several seeds share them.
    """

    name: str = "cifar10"
    limit: int | None = None
    image_size: int | None = None
    holdout: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _at_least("data.seed", self.seed, 0)
        _at_least("data.limit", self.limit, 2)
        _at_least("data.image_size", self.image_size, 1)
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise InputError(
                f"data.holdout is {self.holdout}; give a share of the training set in (0, 1), e.g. 0.1, or none."
            )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Which training labels are wrong.

    fraction: share p of the n training examples that get a wrong label; exactly floor(p n) of them.
    kind: `symmetric` draws the wrong label uniformly, `asymmetric` takes it from `pairs`.
    pairs: (class, wrong class) indices; empty means each class and the next one.
    """

    fraction: float = 0.1
    kind: NoiseKind = "symmetric"
    pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise InputError(
                f"noise.fraction is {self.fraction}; give a share of the training set in [0, 1), e.g. 0.1 for 10 %."
            )
        if self.pairs and self.kind != "asymmetric":
            raise InputError("noise.pairs is given but noise.kind is 'symmetric'; set noise.kind to 'asymmetric'.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network: `resnet9`, `resnet50`, `vit` or `timm:NAME`; `width` scales ResNet-9's channels."""

    name: str = "resnet9"
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise InputError(f"model.width is {self.width}; give a factor above 0, e.g. 0.5 for half the channels.")
        if self.width != 1 and self.name != "resnet9":
            raise InputError(
                f"model.width is {self.width} but only resnet9 has a width; leave it at 1 for {self.name}."
            )


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """Which dropout is inserted, and after which layers.

    kind: `none`; `example_tied` (E5); or a control in the same places: `standard`, `channel` (whole channels at
    random), or `sparse` (all but the first `p_gen` of the channels are off for everyone, always).
    after: layer groups or module names; empty for the model's own places (ResNet-9's six).
    p_gen, p_mem: share of generalization neurons, and probability that an example owns a memorization neuron.
    p_drop: of `standard` and `channel`; None drops as many as example-tied dropout leaves off, (1-p_gen)(1-p_mem).
    """

    kind: DropoutKind = "none"
    after: tuple[str, ...] = ()
    p_gen: float = 0.2
    p_mem: float = 0.1
    p_drop: float | None = None

    def __post_init__(self) -> None:
        check_probability("dropout.p_gen", self.p_gen)
        check_probability("dropout.p_mem", self.p_mem)
        if self.p_drop is not None and not 0 <= self.p_drop < 1:
            raise InputError(f"dropout.p_drop is {self.p_drop}; give a share in [0, 1), e.g. 0.5.")
        # A setting that the kind does not use is no other run: one preset serves example-tied dropout and controls.
        for name in self._unused():
            object.__setattr__(self, name, type(self).__dataclass_fields__[name].default)

    def _unused(self) -> tuple[str, ...]:
        if self.kind in ("standard", "channel"):
            return ("p_gen", "p_mem") if self.p_drop is not None else ()
        return {"none": ("after", "p_gen", "p_mem", "p_drop"), "sparse": ("p_mem", "p_drop")}.get(
            self.kind, ("p_drop",)
        )

    @property
    def dropped_share(self) -> float:
        """Return the probability with which `standard` and `channel` dropout turn a unit off."""
        return (1 - self.p_gen) * (1 - self.p_mem) if self.p_drop is None else self.p_drop


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How it is trained; the defaults are the paper's main setting.

    peak_lr: highest learning rate, reached after `warmup` (a share of all epochs).
    augment: any of `crop`, `flip`, `autoaugment`; empty for the paper's main results.
    precision: `auto` takes bfloat16 where the device multiplies matrices in it faster, else float32.
    gradient_accounting: whose gradient moves which layer (E1) is recorded; without, a step has one backward pass.
    evaluate_every: epochs from one evaluation of all examples to the next; before training and the last always are.
    """

    epochs: int = 50
    batch_size: int = 512
    peak_lr: float = 0.01
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: tuple[Augmentation, ...] = ()
    precision: Precision = "auto"
    gradient_accounting: bool = True
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        _at_least("training.epochs", self.epochs, 1)
        _at_least("training.evaluate_every", self.evaluate_every, 1)
        _at_least("training.batch_size", self.batch_size, 2)
        _positive("training.peak_lr", self.peak_lr)
        if not 0 <= self.warmup < 1:
            raise InputError(f"training.warmup is {self.warmup}; give a share of the epochs in [0, 1), e.g. 0.1.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"training.momentum is {self.momentum}; give a value in [0, 1), e.g. 0.9.")
        if self.weight_decay < 0:
            raise InputError(f"training.weight_decay is {self.weight_decay}; give 0 or more, e.g. 5e-4.")
        if len(set(self.augment)) < len(self.augment):
            raise InputError(f"training.augment names one step twice: {', '.join(self.augment)}.")
        # The steps are applied in one fixed order, so their order here is no other setting.
        object.__setattr__(self, "augment", tuple(s for s in typing.get_args(Augmentation) if s in self.augment))

    @property
    def evaluated_epochs(self) -> tuple[int, ...]:
        """Return the epochs after which all examples are evaluated, in order: from 0 (before training) to the last."""
        return tuple(e for e in range(self.epochs + 1) if e % self.evaluate_every == 0 or e == self.epochs)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which states are kept: those after `epochs` epochs of training (0 is the initialization), and the last."""

    epochs: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if any(e < 0 for e in self.epochs):
            raise InputError(
                f"checkpoints.epochs is {list(self.epochs)}; give epochs from 0 (before training) upwards."
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; give a whole number from 0 upwards.")

    @functools.cached_property
    def run_id(self) -> str:
        """Return the 16 hexadecimal digits that identify the run by the settings that can move its numbers."""
        settings = different_from_defaults(config_from_json(config_to_json(self)))  # 1 and 1.0 are one setting
        settings.pop("checkpoints", None)
        return short_hash(settings)

    @property
    def data_seed(self) -> int:
        """Return the seed of every draw among the examples."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def checkpoint_epochs(self) -> tuple[int, ...]:
        """Return the epochs whose state is kept, in order: those asked for that the run reaches, and its last."""
        asked = {e for e in self.checkpoints.epochs if e <= self.training.epochs}
        return tuple(sorted(asked | {self.training.epochs}))


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the settings as plain dictionaries, lists and numbers, for TOML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_to_json(config: RunConfig) -> str:
    """Return all settings as JSON with sorted keys."""
    return json.dumps(config_to_dict(config), sort_keys=True)


def config_from_json(text: str) -> RunConfig:
    """Return the run settings that `config_to_json` wrote."""
    return build_config(RunConfig, json.loads(text))


def build_config(kind: type[T], settings: Mapping[str, Any], *, path: str = "") -> T:
    """Return the dataclass `kind` with `settings` (nested dictionaries, as TOML gives them) laid over its defaults.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or is out of range.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            raise unknown("setting", f"{path}{key}", [f"{path}{name}" for name in hints])
        values[key] = _convert(value, hints[key], f"{path}{key}")
    return kind(**values)


def different_from_defaults(config: RunConfig) -> dict[str, Any]:
    """Return only the settings that differ from the defaults, nested as in `config_to_dict`."""
    return _difference(config_to_dict(config), config_to_dict(RunConfig()))


def short_hash(settings: object) -> str:
    """Return 16 hexadecimal digits that depend on the content of `settings` and not on its key order."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _difference(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(defaults[key], dict):
            value = _difference(value, defaults[key])
            if value:
                kept[key] = value
        elif value != defaults[key]:
            kept[key] = value
    return kept


def _convert(value: object, hint: object, path: str) -> object:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"setting {path} is {value!r}; give a table of settings.")
        return build_config(typing.cast(type, hint), value, path=f"{path}.")
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise unknown(f"value of {path}", str(value), options)
        return value
    if origin is tuple:
        return _convert_tuple(value, options, path)
    if origin is types.UnionType:
        return None if value in (None, "none") else _convert(value, options[0], path)  # TOML has no null
    return _convert_scalar(value, typing.cast(type, hint), path)


def _convert_tuple(value: object, options: tuple[object, ...], path: str) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"setting {path} is {value!r}; give a list.")
    if options[-1] is Ellipsis:
        return tuple(_convert(v, options[0], path) for v in value)
    if len(value) != len(options):
        raise InputError(f"setting {path} has an entry {value!r}; each needs {len(options)} values.")
    return tuple(_convert(v, o, path) for v, o in zip(value, options, strict=True))


def _convert_scalar(value: object, hint: type, path: str) -> object:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise InputError(f"setting {path} is {value!r}; give a value of type {hint.__name__}.")
    return value


def check_probability(name: str, value: float) -> None:
    """Raise InputError unless `value` lies in (0, 1]."""
    if not 0 < value <= 1:
        raise InputError(f"{name} is {value}; give a share in (0, 1], e.g. 0.2.")


def _at_least(name: str, value: int | None, smallest: int) -> None:
    if value is not None and value < smallest:
        raise InputError(f"{name} is {value}; give at least {smallest}.")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} is {value}; give a value above 0.")
