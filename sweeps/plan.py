"""From a preset and the command line to the runs and experiments that are wanted; pure, no Ray, no compute."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, get_args

from memlib.config import DropoutKind, RunConfig, build_config
from memlib.errors import InputError, unknown
from memlib.experiments import ExperimentsConfig

EXPERIMENTS = tuple(field.name for field in dataclasses.fields(ExperimentsConfig))
MAIN = "none"  # the axis `dropouts`: runs without dropout as the main settings have them
DROPOUTS = {MAIN: "none", "baseline": "none", **{kind: kind for kind in get_args(DropoutKind) if kind != MAIN}}
AXES = ("datasets", "models", "seeds", "noise", "dropouts")
SETTING_FOR = {  # what asks for an experiment
    "rewinding": "rewinding.batchnorm=final",
    "retraining": "retraining.epochs=20",
    "critical_units": "critical_units.examples=1000",
    "cross_validation": "cross_validation.folds=5",
}
AXIS_OPTIONS = {
    "data.name": "--datasets",
    "model.name": "--models",
    "seed": "--seeds",
    "noise.fraction": "--noise",
    "dropout.kind": "--dropouts",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a sweep wants: every combination of the axes, each with its settings.

    settings: nested as in RunConfig and ExperimentsConfig, for every run; an experiment without a table
    there is not wanted. by_dataset, by_model: the same for the runs of one dataset or model, laid over
    `settings` in this order.
    dropouts: `none` (the main runs); a kind of dropout; `baseline`: no dropout, but otherwise as the runs with it.
    by_dropout: laid over all that, for `baseline` and kinds: the table `settings`, then their own. An experiment
    is wanted of these only if it has a table here.
    dropout_models: models that have `baseline` and kinds; None for all.
    """

    datasets: tuple[str, ...]
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    noise: tuple[float, ...]
    settings: Mapping[str, Any]
    by_dataset: Mapping[str, Mapping[str, Any]]
    by_model: Mapping[str, Mapping[str, Any]]
    dropouts: tuple[str, ...] = (MAIN,)
    by_dropout: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dropout_models: tuple[str, ...] | None = None


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
    _check_keys(content, [*AXES, "settings", "dataset", "model", "dropout"], f"preset {name}")
    missing = [key for key in AXES if key not in content and key != "dropouts"]
    if missing:
        raise InputError(f"preset {name} lacks {', '.join(missing)}; give a list for each.")
    by_dropout = dict(content.get("dropout", {}))
    models = by_dropout.pop("models", None)
    _check_keys(by_dropout, ["models", "settings", *(d for d in DROPOUTS if d != MAIN)], f"[dropout] of preset {name}")
    return Preset(
        datasets=tuple(content["datasets"]),
        models=tuple(content["models"]),
        seeds=tuple(content["seeds"]),
        noise=tuple(float(p) for p in content["noise"]),
        settings=content.get("settings", {}),
        by_dataset=content.get("dataset", {}),
        by_model=content.get("model", {}),
        dropouts=tuple(content.get("dropouts", [MAIN])),
        by_dropout=by_dropout,
        dropout_models=None if models is None else tuple(models),
    )


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise unknown(f"key in {where}", key, known)


def with_axes(preset: Preset, axes: Mapping[str, Sequence[Any] | None]) -> Preset:
    """Return the preset with other values on its axes; None leaves one as it is.

    Given together, models and dropouts are combined as they stand, whatever models the preset has dropout in.
    """
    given: dict[str, Any] = {axis: tuple(values) for axis, values in axes.items() if values is not None}
    if {"models", "dropouts"} <= given.keys():
        given["dropout_models"] = None
    return replace(preset, **given)


def plan_runs(
    preset: Preset, overrides: Mapping[str, Any] | None = None, *, experiments: Sequence[str] | None = None
) -> dict[RunConfig, ExperimentsConfig]:
    """Return the wanted runs, each once, with the experiments wanted of each.

    Dropout by dropout, dataset by dataset, model by model, noise by noise, seed by seed. `overrides` are settings
    that win over the preset's; the axes are not among them. Only the named `experiments` are wanted; None: all
    that have settings.

    Raises:
        InputError: a setting is unknown or out of range, or is one of the axes, or an experiment or a dropout is
            unknown, or no run is wanted, or no run has settings for a named experiment.
    """
    for name in experiments or ():
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
    for name in preset.dropouts:
        if name not in DROPOUTS:
            raise unknown("dropout", name, DROPOUTS)
    check_no_axis(overrides or {}, AXIS_OPTIONS)
    named = EXPERIMENTS if experiments is None else experiments
    wanted: dict[str, tuple[RunConfig, ExperimentsConfig]] = {}
    for dropout, dataset, model, noise, seed in _combinations(preset):
        axes = {"data": {"name": dataset}, "model": {"name": model}, "noise": {"fraction": noise}, "seed": seed}
        axes["dropout"] = {"kind": DROPOUTS[dropout]}
        layers = [preset.settings, preset.by_dataset.get(dataset, {}), preset.by_model.get(model, {})]
        settings = merge([*layers, *_dropout_layers(preset, dropout), overrides or {}, axes])
        asked = {name: settings.pop(name) for name in EXPERIMENTS if name in settings}
        run = build_config(RunConfig, settings)
        of_this = _experiments_of(preset, dropout)
        chosen = {name: table for name, table in asked.items() if name in named and name in of_this}
        wanted.setdefault(run.run_id, (run, build_config(ExperimentsConfig, chosen)))
    _check_settings_of(experiments or (), [found for _, found in wanted.values()])
    return dict(wanted.values())


def _check_settings_of(experiments: Sequence[str], wanted: Sequence[ExperimentsConfig]) -> None:
    """Raise InputError if an experiment that is asked for is wanted of no run."""
    for name in experiments:
        if all(getattr(found, name) is None for found in wanted):
            raise InputError(
                f"experiment {name} is asked for, but no run that is wanted has settings for it; give one of them with "
                f"--set {SETTING_FOR[name]}, or leave it out of --experiments (runs with dropout have their own, "
                "in the preset's [dropout.NAME])."
            )


def _combinations(preset: Preset) -> list[tuple[str, str, str, float, int]]:
    dropouts = sorted(preset.dropouts, key=lambda name: name != MAIN)  # the main runs' experiments follow them
    axes = itertools.product(dropouts, preset.datasets, preset.models, preset.noise, preset.seeds)
    with_dropout = preset.models if preset.dropout_models is None else preset.dropout_models
    chosen = [point for point in axes if point[0] == MAIN or point[2] in with_dropout]
    if not chosen:
        raise InputError(
            f"no run is wanted: dropouts are {', '.join(preset.dropouts)} and models {', '.join(preset.models)}, but "
            f"here dropout is for {', '.join(with_dropout)}; give --models and --dropouts together to combine them."
        )
    return chosen


def _dropout_layers(preset: Preset, dropout: str) -> list[Mapping[str, Any]]:
    return [] if dropout == MAIN else [preset.by_dropout.get(name, {}) for name in ("settings", dropout)]


def _experiments_of(preset: Preset, dropout: str) -> set[str]:
    """Return the names of the tables that a run's experiments may be among: of a main one all."""
    if dropout == MAIN:
        return set(EXPERIMENTS)
    return {table for layer in _dropout_layers(preset, dropout) for table in layer}


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
