"""Out-of-sample predictions: what is planned, how folds are drawn, and a fold against a training written here."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlib.config import DropoutConfig, RunConfig
from memlib.cross_validation import assign_folds, fold_config, perform_cross_validation, plan_cross_validation
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.evaluation import predict_probabilities
from memlib.experiments import CrossValidationConfig
from memlib.models import build_model
from memlib.runs import prepare_data
from memlib.seeds import stream
from memlib.training import train
from memlib.training_state import TrainingData

CPU = torch.device("cpu")


@given(labels=st.lists(st.integers(0, 3), min_size=2, max_size=40), folds=st.integers(2, 6), seed=st.integers(0, 99))
def test_folds_are_equally_large_and_each_label_is_spread_over_them(labels, folds, seed):
    labels = torch.tensor(labels)
    if folds > len(labels):
        with pytest.raises(InputError, match=f"cross_validation.folds is {folds} for {len(labels)} examples"):
            assign_folds(labels, folds, generator=stream(seed, "folds"))
        return
    got = assign_folds(labels, folds, generator=stream(seed, "folds"))
    assert torch.equal(got, assign_folds(labels, folds, generator=stream(seed, "folds")))
    sizes = got.bincount(minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for label in labels.unique():
        of_label = got[labels == label].bincount(minlength=folds)
        assert of_label.max() - of_label.min() <= 1


def test_folds_differ_between_seeds():
    labels = torch.arange(100) % 10
    drawn = [assign_folds(labels, 5, generator=stream(seed, "folds")) for seed in (0, 1)]
    assert not torch.equal(*drawn)


def test_a_unit_is_one_fold_and_names_its_epochs(small_run):
    def ids(config):
        return [task.units[0].unit_id for task in plan_cross_validation(small_run, config)]

    assert len(set(ids(CrossValidationConfig()))) == 5
    assert ids(CrossValidationConfig()) == ids(CrossValidationConfig(epochs=small_run.training.epochs))
    assert not set(ids(CrossValidationConfig())) & set(ids(CrossValidationConfig(epochs=2)))
    assert not set(ids(CrossValidationConfig())) & set(ids(CrossValidationConfig(folds=4)))


@pytest.mark.parametrize(("setting", "value"), [("folds", 1), ("epochs", 0)])
def test_impossible_settings_are_named(setting, value):
    with pytest.raises(InputError, match=f"cross_validation.{setting} is {value}; give at least"):
        CrossValidationConfig(**{setting: value})


def test_networks_of_folds_have_no_dropout_and_seeds_of_their_own():
    run = RunConfig(dropout=DropoutConfig(kind="example_tied"), seed=3)
    configs = [fold_config(run, fold=fold, epochs=7) for fold in range(2)]
    assert all(config.dropout.kind == "none" and config.training.epochs == 7 for config in configs)
    assert len({run.seed, *(config.seed for config in configs)}) == 3


def test_the_rows_of_a_fold_are_the_predictions_of_a_network_trained_on_the_others(digits, small_run):
    run = replace(small_run, training=replace(small_run.training, epochs=1))
    data = prepare_data(run, digits)
    task = plan_cross_validation(run, CrossValidationConfig(folds=4))[2]
    final = build_model(run.model, image_shape=digits.image_shape, num_classes=10, seed=0)
    (tables,) = perform_cross_validation(task, final, data, lambda epoch: {})
    rows = tables["cross_validation"]
    held_out = assign_folds(data.noisy_labels.labels, 4, generator=stream(run.seed, "folds")) == 2
    assert [row["example_id"] for row in rows] == data.train.ids[held_out].tolist()
    config = fold_config(run, fold=2, epochs=1)
    network = build_model(config.model, image_shape=digits.image_shape, num_classes=10, seed=config.seed)
    others = ImageSet(data.train.images[~held_out], data.noisy_labels.labels[~held_out], data.train.ids[~held_out])
    training = TrainingData(others, torch.zeros(len(others), dtype=torch.bool), digits.test, "")
    list(train(network, training, config, device=CPU, checkpoints=None))
    expected = predict_probabilities(network, data.train.images[held_out], device=CPU)
    got = torch.tensor([row["probabilities"] for row in rows])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
