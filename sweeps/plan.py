"""From a preset and the command line to the runs and experiments that are wanted; pure, no Ray, no compute."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from memlib.config import RunConfig, build_config
from memlib.errors import InputError, unknown
from memlib.experiments import ExperimentsConfig

EXPERIMENTS = tuple(field.name for field in dataclasses.fields(ExperimentsConfig))
AXES = ("datasets", "models", "seeds", "noise")
AXIS_OPTIONS = {
    "data.name": "--datasets",
    "model.name": "--models",
    "seed": "--seeds",
    "noise.fraction": "--noise",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a sweep wants: every combination of the axes, each with its settings.

    settings: nested as in RunConfig and ExperimentsConfig, for every run; an experiment without a table
    there is not wanted. by_dataset, by_model: the same for the runs of one dataset or model, laid over
    `settings` in this order.
    """

    datasets: tuple[str, ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    noise: tuple[float, ...]
    settings: Mapping[str, Any]
    by_dataset: Mapping[str, Mapping[str, Any]]
    by_model: Mapping[str, Mapping[str, Any]]


def preset_names() -> list[str]:
    """Return the names of the presets that come with memlib."""
    return sorted(f.name.removesuffix(".toml") for f in files("sweeps.presets").iterdir() if f.name.endswith(".toml"))


def load_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        InputError: there is no such preset, or a key in it is unknown.
    """
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    return parse_preset(files("sweeps.presets").joinpath(f"{name}.toml").read_text(), name=name)


def parse_preset(text: str, *, name: str) -> Preset:
    """Return the preset a TOML text describes; `name` names it in errors."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"preset {name} is not valid TOML: {error}.") from error
    keys = [*AXES, "settings", "dataset", "model"]
    for key in content:
        if key not in keys:
            raise unknown(f"key in preset {name}", key, keys)
    missing = [key for key in AXES if key not in content]
    if missing:
        raise InputError(f"preset {name} lacks {', '.join(missing)}; give a list for each.")
    return Preset(
        datasets=tuple(content["datasets"]),
        models=tuple(content["models"]),
        seeds=tuple(content["seeds"]),
        noise=tuple(float(p) for p in content["noise"]),
        settings=content.get("settings", {}),
        by_dataset=content.get("dataset", {}),
        by_model=content.get("model", {}),
    )


def with_axes(preset: Preset, axes: Mapping[str, Sequence[Any] | None]) -> Preset:
    """Return the preset with other values on its axes; None leaves one as it is."""
    return replace(preset, **{axis: tuple(values) for axis, values in axes.items() if values is not None})


def plan_runs(
    preset: Preset, overrides: Mapping[str, Any] | None = None, *, experiments: Sequence[str] = EXPERIMENTS
) -> dict[RunConfig, ExperimentsConfig]:
    """Return the wanted runs, each once, with the experiments wanted of each.

    Dataset by dataset, model by model, noise by noise, seed by seed. `overrides` are settings that win
    over the preset's; the axes are not among them. Only the named `experiments` are wanted.

    Raises:
        InputError: a setting is unknown or out of range, or is one of the axes, or an experiment is unknown.
    """
    for name in experiments:
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
    check_no_axis(overrides or {}, AXIS_OPTIONS)
    wanted: dict[str, tuple[RunConfig, ExperimentsConfig]] = {}
    for dataset, model, noise, seed in itertools.product(preset.datasets, preset.models, preset.noise, preset.seeds):
        layers = [preset.settings, preset.by_dataset.get(dataset, {}), preset.by_model.get(model, {}), overrides or {}]
        axes = {"data": {"name": dataset}, "model": {"name": model}, "noise": {"fraction": noise}, "seed": seed}
        settings = merge([*layers, axes])
        asked = {name: settings.pop(name) for name in EXPERIMENTS if name in settings}
        run = build_config(RunConfig, settings)
        chosen = {name: table for name, table in asked.items() if name in experiments}
        wanted[run.run_id] = (run, build_config(ExperimentsConfig, chosen))
    return dict(wanted.values())


def check_no_axis(overrides: Mapping[str, Any], options: Mapping[str, str]) -> None:
    """Raise InputError if settings given with --set name an axis; `options` are those to give the axes with."""
    for setting, option in options.items():
        section, _, key = setting.partition(".")
        value = overrides.get(section)
        if value is not None and (not key or (isinstance(value, Mapping) and key in value)):
            raise InputError(f"{setting} cannot be given with --set, a sweep has several; use {option}.")


def merge(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return nested settings laid over each other, later ones on top; the layers are left unchanged."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge([merged[key], value]) if both_tables else value
    return merged


def parse_setting(text: str) -> dict[str, Any]:
    """Return the nested setting that `section.key=value` gives; the value is read as TOML, else as text.

    Raises:
        InputError: there is no `=`.
    """
    path, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text!r} has no '='; write it as --set training.peak_lr=0.05.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *sections, key = path.strip().split(".")
    setting: dict[str, Any] = {key: parsed}
    for section in reversed(sections):
        setting = {section: setting}
    return setting
