"""Which runs may be averaged: those whose settings agree in everything but the seed and the kept checkpoints.

Runs with dropout, and the controls of example-tied dropout, are kept apart from the others, the main runs: neither
shows in the other's labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from memlib.config import (
    CheckpointConfig,
    DropoutConfig,
    RunConfig,
    TrainingConfig,
    config_from_json,
    config_to_dict,
    config_to_json,
)

# The seed is averaged over; which checkpoints are kept moves no number.
_NOT_SETTINGS = ("seed", "checkpoints")
_DROPOUT = "dropout.kind"
_OF_THE_DATA = ("data.", "noise.", "training.augment")  # what models that are compared must agree in


def label_settings(runs: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return, for each run (dataset, model, config as JSON), the settings that set it apart, "" if none do.

    A main run is compared with the other main runs of its dataset and model: two of them get the same label
    exactly if their settings agree, e.g. "noise.fraction=0.05" and "noise.fraction=0.1". A run with dropout, or a
    control of such runs, is compared with those of its kind, and the kind comes first: "dropout.kind=sparse".
    Images, augmentation and noise are named where any model's differ: models of one label are shown side by side.
    """
    runs = list(runs)
    configs = [config_from_json(config) for _, _, config in runs]
    settings = [_settings_of(config) for config in configs]
    are_main = _find_main(configs)
    members: dict[tuple[str, ...], list[int]] = defaultdict(list)
    of_all_models: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, (dataset, model, _) in enumerate(runs):
        kind = "" if are_main[i] else settings[i][_DROPOUT]
        members[dataset, model, kind].append(i)
        of_all_models[dataset, kind].append(i)
    labels = [""] * len(runs)
    for (dataset, _, kind), chosen in members.items():
        differing = [_DROPOUT] if kind else []
        own = _differing_keys([settings[i] for i in chosen])
        between_models = _differing_keys([settings[i] for i in of_all_models[dataset, kind]])
        differing += [key for key in between_models if key in own or key.startswith(_OF_THE_DATA)]
        for i in chosen:
            labels[i] = ", ".join(f"{key}={settings[i][key]}" for key in differing)
    return labels


def is_main_label(setting: str) -> bool:
    """Return whether `label_settings` gave this label to a main run."""
    return not setting.startswith(f"{_DROPOUT}=")


def label_searches(trials: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return, for each trial (dataset, model, config as JSON), what sets its search apart from others, "" if nothing.

    Trials of one search differ in their dropout, width, peak learning rate and seed.
    """
    return label_settings((dataset, model, _search_of(config)) for dataset, model, config in trials)


def _search_of(config: str) -> str:
    run = config_from_json(config)
    model, training = replace(run.model, width=1.0), replace(run.training, peak_lr=TrainingConfig().peak_lr)
    return config_to_json(replace(run, model=model, training=training, dropout=DropoutConfig()))


def without_dropout(config: RunConfig) -> RunConfig:
    """Return the settings in which example-tied dropout and its controls agree.

    What is recorded while they train, the seed and the kept checkpoints are left out too.
    """
    training = replace(config.training, gradient_accounting=True, evaluate_every=1)
    return replace(config, dropout=DropoutConfig(), training=training, seed=0, checkpoints=CheckpointConfig())


def _find_main(configs: Sequence[RunConfig]) -> list[bool]:
    """Return which runs are main ones: those without dropout, but for controls of runs with dropout.

    A control differs from a main run in that its gradients were not recorded.
    """
    compared = {config_to_json(without_dropout(config)) for config in configs if config.dropout.kind != "none"}
    return [
        config.dropout.kind == "none"
        and (config.training.gradient_accounting or config_to_json(without_dropout(config)) not in compared)
        for config in configs
    ]


def _settings_of(config: RunConfig) -> dict[str, str]:
    settings = config_to_dict(config)
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
