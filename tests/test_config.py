import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlib.config import (
    CheckpointConfig,
    DropoutConfig,
    NoiseConfig,
    RunConfig,
    TrainingConfig,
    build_config,
    config_from_json,
    config_to_json,
    different_from_defaults,
)
from memlib.errors import InputError


def test_settings_survive_json():
    config = build_config(
        RunConfig,
        {"noise": {"kind": "asymmetric", "pairs": [[0, 1], [1, 0]]}, "training": {"augment": ["crop"]}, "seed": 3},
    )
    assert config_from_json(config_to_json(config)) == config


@given(seed=st.integers(0, 2**31), fraction=st.floats(0, 0.99), epochs=st.integers(1, 200))
def test_the_run_id_depends_on_every_setting_that_can_move_a_number(seed, fraction, epochs):
    base = RunConfig(seed=seed)
    other = RunConfig(seed=seed, noise=NoiseConfig(fraction=fraction), training=TrainingConfig(epochs=epochs))
    same = fraction == NoiseConfig().fraction and epochs == TrainingConfig().epochs
    assert (base.run_id == other.run_id) == same


def test_the_run_id_does_not_depend_on_which_checkpoints_are_kept():
    assert RunConfig(checkpoints=CheckpointConfig(epochs=(0, 5))).run_id == RunConfig().run_id


def test_the_run_id_of_the_default_run_never_changes():
    # Finished results are found by this id: if this fails, a default was changed, and may not be.
    assert RunConfig().run_id == "44136fa355b3678a"
    assert different_from_defaults(RunConfig()) == {}


def test_runs_from_before_dropout_keep_their_ids():
    before = {"model": {"width": 0.25}, "seed": 1, "training": {"epochs": 30}}  # as stored before there was dropout
    assert build_config(RunConfig, before).run_id == "b8710a4f3c2168e7"
    assert RunConfig(dropout=DropoutConfig()).run_id == RunConfig().run_id


def test_accounting_and_evaluation_as_before_are_no_other_run():
    assert RunConfig(training=TrainingConfig(gradient_accounting=True, evaluate_every=1)).run_id == RunConfig().run_id
    without = build_config(RunConfig, {"training": {"gradient_accounting": False}})
    assert len({without.run_id, RunConfig(training=TrainingConfig(evaluate_every=2)).run_id, RunConfig().run_id}) == 3


@pytest.mark.parametrize(("every", "evaluated"), [(1, (0, 1, 2, 3, 4, 5)), (2, (0, 2, 4, 5)), (9, (0, 5))])
def test_the_first_and_the_last_epoch_are_always_evaluated(every, evaluated):
    assert TrainingConfig(epochs=5, evaluate_every=every).evaluated_epochs == evaluated


def test_a_dropout_setting_that_its_kind_does_not_use_is_no_other_run():
    assert DropoutConfig(p_gen=0.4, after=("conv1",)) == DropoutConfig()
    assert DropoutConfig(kind="sparse", p_mem=0.5) == DropoutConfig(kind="sparse")
    assert DropoutConfig(kind="standard", p_drop=0.5, p_gen=0.4) == DropoutConfig(kind="standard", p_drop=0.5)
    for kind, other in (
        ("example_tied", {"p_gen": 0.4}),
        ("example_tied", {"p_mem": 0.4}),
        ("example_tied", {"after": ("conv1",)}),
        ("standard", {"p_gen": 0.4}),
        ("channel", {"p_drop": 0.4}),
        ("sparse", {"p_gen": 0.4}),
    ):
        assert (
            RunConfig(dropout=DropoutConfig(kind=kind, **other)).run_id
            != RunConfig(dropout=DropoutConfig(kind=kind)).run_id
        )


def test_checkpoints_are_those_asked_for_that_the_run_reaches_and_its_last():
    config = RunConfig(training=TrainingConfig(epochs=5), checkpoints=CheckpointConfig(epochs=(4, 0, 10)))
    assert config.checkpoint_epochs == (0, 4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": {"fraction": 1.0}}, r"noise.fraction is 1.0; give a share of the training set in \[0, 1\)"),
        ({"noise": {"fraction": -0.1}}, "noise.fraction is -0.1"),
        ({"training": {"epochs": 0}}, "training.epochs is 0; give at least 1"),
        ({"training": {"peak_lr": -1.0}}, "training.peak_lr is -1.0; give a value above 0"),
        ({"training": {"epoch": 5}}, "setting 'training.epoch' is not known; did you mean 'training.epochs'"),
        ({"training": {"epochs": "5"}}, "training.epochs is '5'; give a value of type int"),
        ({"training": {"epochs": True}}, "training.epochs is True; give a value of type int"),
        ({"training": {"gradient_accounting": 1}}, "gradient_accounting is 1; give a value of type bool"),
        ({"training": {"evaluate_every": 0}}, "training.evaluate_every is 0; give at least 1"),
        ({"training": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"training": {"augment": ["flip", "flip"]}}, "names one step twice"),
        ({"noise": {"pairs": [[0, 1, 2]], "kind": "asymmetric"}}, "each needs 2 values"),
        ({"noise": {"pairs": [[0, 1]]}}, "set noise.kind to 'asymmetric'"),
        ({"model": {"name": "vit", "width": 0.5}}, "only resnet9 has a width"),
        ({"model": 3}, "setting model is 3; give a table"),
        ({"checkpoints": {"epochs": [-1]}}, "give epochs from 0"),
        ({"seed": -1}, "seed is -1"),
        ({"dropout": {"kind": "tied"}}, "value of dropout.kind 'tied' is not known; choose from channel, example_tied"),
        ({"dropout": {"p_gen": 0.0}}, r"dropout.p_gen is 0.0; give a share in \(0, 1\]"),
        ({"dropout": {"p_mem": 1.5}}, r"dropout.p_mem is 1.5; give a share in \(0, 1\]"),
        ({"dropout": {"kind": "standard", "p_drop": 1.0}}, r"dropout.p_drop is 1.0; give a share in \[0, 1\)"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(settings, message):
    with pytest.raises(InputError, match=message):
        build_config(RunConfig, settings)


def test_whole_numbers_are_taken_for_real_ones_but_stay_the_same_run():
    assert build_config(RunConfig, {"training": {"peak_lr": 1}}) == build_config(
        RunConfig, {"training": {"peak_lr": 1.0}}
    )


def test_the_run_id_survives_json_and_ignores_the_order_of_augmentation():
    by_hand = RunConfig(noise=NoiseConfig(fraction=0.0), training=TrainingConfig(augment=("flip", "crop")))
    assert by_hand.run_id == config_from_json(config_to_json(by_hand)).run_id
    assert by_hand.run_id == replace(by_hand, training=TrainingConfig(augment=("crop", "flip"))).run_id


def test_the_stored_settings_are_complete():
    stored = json.loads(config_to_json(replace(RunConfig(), seed=7)))
    assert stored["seed"] == 7
    assert stored["training"]["momentum"] == 0.9


@pytest.mark.parametrize("value", [None, "none"])
def test_none_takes_back_a_setting_that_may_be_none(value):
    assert build_config(RunConfig, {"data": {"limit": value, "holdout": value}}) == RunConfig()


def test_none_is_no_value_of_a_setting_that_needs_one():
    with pytest.raises(InputError, match="setting training.epochs is 'none'; give a value of type int"):
        build_config(RunConfig, {"training": {"epochs": "none"}})
