"""With a seed of their own, the draws among the examples are the same in runs that differ in everything else drawn."""

import pkgutil
from dataclasses import replace

import pyarrow.compute as pc
import pytest
import torch

from memlib.config import DataConfig
from memlib.errors import InputError
from memlib.evaluation import Predictions
from memlib.experiments import (
    CriticalUnitsConfig,
    CrossValidationConfig,
    ExperimentsConfig,
    RetrainingConfig,
    RewindingConfig,
)
from memlib.results import create_results
from memlib.runs import build_network, perform_run, prepare_data
from memlib.tasks import perform_task, plan_tasks

CPU = torch.device("cpu")


def drawn(run, digits):
    """Return every draw among the examples that a run's data are made by."""
    data = prepare_data(run, digits)
    noisy, held_out = data.noisy_labels, data.held_out
    return [data.train.ids, noisy.labels, noisy.is_noisy, held_out.ids, held_out.labels]


@pytest.mark.parametrize("data_seed", [None, 5])
def test_examples_and_wrong_labels_follow_the_seed_of_the_data(small_run, digits, data_seed):
    data = replace(small_run.data, limit=100, holdout=0.2, seed=data_seed)
    runs = [replace(small_run, data=data, seed=seed) for seed in (0, 1)]
    pairs = zip(*(drawn(run, digits) for run in runs), strict=True)
    assert [a.shape == b.shape and bool((a == b).all()) for a, b in pairs] == [data_seed is not None] * 5
    weights = [torch.cat([p.flatten() for p in build_network(run, digits).parameters()]) for run in runs]
    assert not weights[0].equal(weights[1])
    assert runs[0].run_id != runs[1].run_id


def test_the_runs_seed_given_for_the_data_draws_what_it_draws_anyway(small_run, digits):
    data = replace(small_run.data, limit=100, holdout=0.2)
    runs = [replace(small_run, data=replace(data, seed=seed), seed=3) for seed in (None, 3)]
    for a, b in zip(*(drawn(run, digits) for run in runs), strict=True):
        assert a.equal(b)


@pytest.fixture
def calls_of(monkeypatch):
    """Records a function's calls, by where it is looked up."""

    def record(target):
        calls, real = [], pkgutil.resolve_name(target)
        monkeypatch.setattr(target, lambda *given, **named: calls.append((given, named)) or real(*given, **named))
        return calls

    return record


def test_experiments_take_examples_in_the_same_order_and_draw_all_else_anew(
    small_run, digits, tmp_path, monkeypatch, calls_of
):
    store = create_results(tmp_path / "results")
    experiments = ExperimentsConfig(
        rewinding=RewindingConfig(epochs=(0,), limit=10),
        retraining=RetrainingConfig(epochs=1, limit=10),
        critical_units=CriticalUnitsConfig(examples=4, part_size=4, max_steps=1, reference_size=16, limit=50),
        cross_validation=CrossValidationConfig(folds=2, epochs=1),
    )
    training = replace(small_run.training, epochs=1)
    runs = [replace(small_run, data=replace(small_run.data, seed=5), training=training, seed=seed) for seed in (0, 1)]
    # Searched are those that the network predicts as assigned: here all, so that the draw alone decides.
    monkeypatch.setattr("memlib.neuron_units.predict", _all_right)
    batches = calls_of("memlib.training.training_batches")
    rewound, retrained = (calls_of(f"memlib.layer_units.{name}") for name in ("rewinding_accuracies", "retrain"))
    searches, judged = (
        calls_of(f"memlib.neuron_units.{name}") for name in ("find_critical_units", "edited_accuracies")
    )
    for run in runs:
        perform_run(run, digits, store, device=CPU)
        for task in plan_tasks(run, experiments, ["classifier"]):
            perform_task(task, digits, store, device=CPU)

    for calls, splits in ((rewound, lambda given: given[2]), (retrained, lambda given: given[4])):
        first, second = (splits(given) for given, _ in calls)
        assert all(first[name][0].equal(second[name][0]) for name in ("clean", "noisy", "test"))
    half = len(searches) // 2
    for (one, own), (other, others) in zip(searches[:half], searches[half:], strict=True):
        assert one[1].ids.equal(other[1].ids)  # the examples
        assert one[2].ids.equal(other[2].ids)  # the reference
        assert (own["seed"], others["seed"]) == (0, 1)
    assert all(a[3][0].ids.equal(b[3][0].ids) for (a, _), (b, _) in zip(judged[:half], judged[half:], strict=True))
    assert [named["how"].seed for _, named in retrained] == [0, 1]
    seeds = [named["seed"] for _, named in batches]
    assert len(set(seeds)) == 6  # two runs, and two folds of each
    folds = [store.read("cross_validation").filter(pc.field("run_id") == r.run_id).sort_by("example_id") for r in runs]
    assert folds[0]["fold"] == folds[1]["fold"]
    assert folds[0]["probabilities"] != folds[1]["probabilities"]


def _all_right(model, images, labels, *, device):
    return Predictions(labels, torch.ones(len(labels)), torch.zeros(len(labels)))


def test_a_seed_below_zero_is_refused():
    with pytest.raises(InputError, match="data.seed is -1; give at least 0"):
        DataConfig(seed=-1)
