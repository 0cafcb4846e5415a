"""Which runs may be averaged: those whose settings agree in everything but the seed and the kept checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from memlib.config import DropoutConfig, TrainingConfig, config_from_json, config_to_dict, config_to_json

# The seed is averaged over; which checkpoints are kept moves no number.
_NOT_SETTINGS = ("seed", "checkpoints")


def label_settings(runs: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return, for each run (dataset, model, config as JSON), the settings that set it apart, "" if none do.

    A run is compared with the others of its dataset and model: two of them get the same label
    exactly if their settings agree, e.g. "noise.fraction=0.05" and "noise.fraction=0.1".
    """
    runs = list(runs)
    settings = [_settings_of(config) for _, _, config in runs]
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, (dataset, model, _) in enumerate(runs):
        members[dataset, model].append(i)
    labels = [""] * len(runs)
    for chosen in members.values():
        differing = _differing_keys([settings[i] for i in chosen])
        for i in chosen:
            labels[i] = ", ".join(f"{key}={settings[i][key]}" for key in differing)
    return labels


def label_searches(trials: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return, for each trial (dataset, model, config as JSON), what sets its search apart from others, "" if nothing.

    Trials of one search differ in their dropout, width, peak learning rate and seed.
    """
    return label_settings((dataset, model, _search_of(config)) for dataset, model, config in trials)


def _search_of(config: str) -> str:
    run = config_from_json(config)
    model, training = replace(run.model, width=1.0), replace(run.training, peak_lr=TrainingConfig().peak_lr)
    return config_to_json(replace(run, model=model, training=training, dropout=DropoutConfig()))


def _settings_of(config: str) -> dict[str, str]:
    settings = config_to_dict(config_from_json(config))
    return _flatten({key: value for key, value in settings.items() if key not in _NOT_SETTINGS})


def _flatten(settings: Mapping[str, object], path: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = _spell(value)
    return flat


def _spell(value: object) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return "+".join(_spell(v).replace("+", ">") for v in value)
    return str(value)


def _differing_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    return [key for key in settings[0] if len({s[key] for s in settings}) > 1]
