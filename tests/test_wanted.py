"""What a sweep still has to do, told from the store."""

from dataclasses import replace

import pytest
import torch

from memlib.cross_validation import plan_cross_validation
from memlib.experiments import (
    CriticalUnitsConfig,
    CrossValidationConfig,
    ExperimentsConfig,
    RetrainingConfig,
    RewindingConfig,
)
from memlib.layer_groups import layer_groups
from memlib.models import build_model
from memlib.results import create_results
from memlib.runs import perform_run
from sweeps.costs import run_cost, task_cost
from sweeps.preflight import load_datasets as load
from sweeps.wanted import still_to_do


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, small_run):
    """A store with the same small run, with gradient accounting and without."""
    store = create_results(tmp_path_factory.mktemp("wanted"))
    training = replace(small_run.training, epochs=1, evaluate_every=9)
    runs = [replace(small_run, training=replace(training, gradient_accounting=yes)) for yes in (True, False)]
    for run in runs:
        perform_run(run, digits, store, device=torch.device("cpu"))
    return runs, store


def test_a_finished_run_without_gradients_has_the_layer_groups_of_its_network(trained, digits):
    runs, store = trained
    model = build_model(runs[0].model, image_shape=digits.image_shape, num_classes=10, seed=0)
    wanted = ExperimentsConfig(rewinding=RewindingConfig(), retraining=RetrainingConfig())
    for run in runs:
        tasks = still_to_do({run: wanted}, store).tasks
        assert [task.units[0].settings["groups"] for task in tasks if task.experiment == "rewinding"] == [
            [name] for name in layer_groups(model).names
        ]
        assert len(tasks) == 18


def test_images_are_loaded_for_layer_groups_only_where_they_are_asked_for(trained, monkeypatch):
    runs, store = trained
    loaded = []
    monkeypatch.setattr("sweeps.wanted.load_datasets", lambda runs, root: loaded.extend(runs) or load(runs, root))
    searched = ExperimentsConfig(critical_units=CriticalUnitsConfig(examples=50))
    rewound = ExperimentsConfig(rewinding=RewindingConfig())
    assert still_to_do({runs[0]: rewound, runs[1]: searched}, store).tasks
    assert loaded == []
    assert still_to_do({runs[0]: rewound, runs[1]: rewound}, store).tasks
    assert loaded == [runs[1]]


def test_a_plain_step_is_planned_as_three_passes_and_only_evaluated_epochs_are_evaluated(digits, small_run):
    def passes(**settings):
        run = replace(small_run, training=replace(small_run.training, epochs=10, **settings))
        return run_cost(run, digits).flops

    evaluation = (passes(evaluate_every=5) - passes(evaluate_every=10)) / 260  # one more, of 200 + 60 images
    assert passes() == pytest.approx((10 * 5 * 200 + 12 * 260) * evaluation)
    assert passes(gradient_accounting=False) == pytest.approx((10 * 3 * 200 + 12 * 260) * evaluation)
    assert passes(evaluate_every=4) == pytest.approx((10 * 5 * 200 + 5 * 260) * evaluation)


def test_a_fold_is_planned_as_plain_steps_on_the_others_and_two_evaluations_of_all(digits, small_run):
    task = plan_cross_validation(small_run, CrossValidationConfig(folds=4, epochs=3))[0]
    one_epoch = plan_cross_validation(small_run, CrossValidationConfig(folds=4, epochs=1))[0]
    forward = run_cost(small_run, digits).flops / (3 * 5 * 200 + 5 * 260)
    passes = [task_cost(t, digits).flops / forward for t in (task, one_epoch)]
    assert passes == pytest.approx([3 * 3 * 150 + 2 * 200 + 50, 3 * 150 + 2 * 200 + 50])
