"""Area under the margin and forgetting events against counts by hand, a slow loop, and a run's own checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from memlib.checkpoints import Checkpoint, CheckpointFolder, load_model_state
from memlib.config import CheckpointConfig
from memlib.errors import InputError
from memlib.evaluation import predict
from memlib.results import create_results
from memlib.runs import build_network, perform_run, prepare_data
from memlib.training_dynamics import NEVER, after_epoch, start_dynamics

CPU = torch.device("cpu")


def dynamics_of(margins, predictions, labels):
    """Epochs 1, 2, ... of margins and predictions [epochs, examples]."""
    dynamics = start_dynamics(len(labels))
    for epoch, (margin, prediction) in enumerate(zip(margins, predictions, strict=True), start=1):
        dynamics = after_epoch(dynamics, epoch, margin=margin, prediction=prediction, labels=labels)
    return dynamics


def test_dynamics_are_those_counted_by_hand():
    labels = np.array([0, 1, 2])
    predictions = np.array(
        [[0, 0, 2], [1, 0, 2], [0, 2, 2], [2, 0, 2]]
    )  # learned twice and forgotten twice; never; always
    margins = np.array([[1.0, -2.0, 3.0], [-1.0, -4.0, 3.0], [2.0, -1.0, 3.0], [-4.0, -1.0, 5.0]])
    got = dynamics_of(margins, predictions, labels)
    assert got.n_epochs == 4
    assert got.summarize().aum.tolist() == [-0.5, -2.0, 3.5]
    assert got.forgetting_events.tolist() == [2, 0, 0]
    assert got.first_learned.tolist() == [1, NEVER, 1]
    assert got.last_mistake.tolist() == [2, 0, NEVER]
    assert got.is_learned.tolist() == [False, False, True]


@given(st.data())
def test_dynamics_equal_a_slow_loop_over_examples(data):
    n, n_epochs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    labels = data.draw(arrays.arrays(np.int64, n, elements=st.integers(0, 2)))
    predictions = data.draw(arrays.arrays(np.int64, (n_epochs, n), elements=st.integers(0, 2)))
    margins = data.draw(arrays.arrays(np.float32, (n_epochs, n), elements=st.integers(-9, 9)))
    got = dynamics_of(margins, predictions, labels)
    for i, label in enumerate(labels):
        right = [prediction == label for prediction in predictions[:, i]]
        mistakes = [prediction for prediction in predictions[:, i] if prediction != label]
        assert got.summarize().aum[i] == pytest.approx(sum(map(float, margins[:, i])) / n_epochs)
        assert got.forgetting_events[i] == sum(a and not b for a, b in zip(right, right[1:], strict=False))
        assert got.first_learned[i] == (right.index(True) + 1 if any(right) else NEVER)
        assert got.last_mistake[i] == (mistakes[-1] if mistakes else NEVER)


def test_before_the_first_epoch_there_is_no_area():
    with pytest.raises(InputError, match="no training dynamics before the first epoch"):
        start_dynamics(3).summarize()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, small_run):
    """A run that keeps its state after every epoch and evaluates all but the second."""
    training = replace(small_run.training, epochs=4, evaluate_every=2, gradient_accounting=False, peak_lr=0.2)
    config = replace(small_run, training=training, checkpoints=CheckpointConfig(epochs=(0, 1, 2, 3, 4)))
    store = create_results(tmp_path_factory.mktemp("whole"))
    perform_run(config, digits, store, device=CPU)
    return config, store


def test_a_runs_dynamics_are_those_of_its_states_after_the_evaluated_epochs(trained, digits):
    config, store = trained
    data, checkpoints = prepare_data(config, digits), CheckpointFolder(store.storage, config.run_id)
    labels, model = data.noisy_labels.labels, build_network(config, digits)
    found = []
    for epoch in (2, 4):  # not the state before training, nor what was not evaluated
        load_model_state(model, checkpoints.load_epoch(epoch).tensors, where="")
        found.append(predict(model, data.train.images, labels, device=CPU))
    rows = store.read("dynamics").to_pylist()
    assert [row["example_id"] for row in rows] == data.train.ids.tolist()
    for i, row in enumerate(rows):
        mistakes = [int(f.prediction[i]) for f in found if f.prediction[i] != labels[i]]
        right = [epoch for epoch, f in zip((2, 4), found, strict=True) if f.prediction[i] == labels[i]]
        assert row["aum"] == pytest.approx(sum(f.margin[i].item() for f in found) / 2, abs=1e-4)
        assert row["first_learned"] == min(right, default=None)
        assert row["last_mistake"] == (mistakes[-1] if mistakes else None)
        assert row["forgetting_events"] == (right == [2])
        assert row["n_epochs"] == 2
    assert {row["first_learned"] for row in rows} == {None, 2, 4}


def interrupted(config, digits, store, *, after):
    def interrupt(record):
        if record.epoch == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform_run(config, digits, store, device=CPU, on_epoch=interrupt)


def test_dynamics_survive_an_interruption_to_the_bit(trained, digits, tmp_path):
    config, whole = trained
    parts = create_results(tmp_path)
    interrupted(config, digits, parts, after=1)
    interrupted(config, digits, parts, after=3)
    perform_run(config, digits, parts, device=CPU)
    assert parts.read("dynamics").equals(whole.read("dynamics"))


def test_a_run_begun_before_there_were_dynamics_starts_over_instead_of_lacking_epochs(trained, digits, tmp_path):
    config, whole = trained
    parts = create_results(tmp_path)
    interrupted(config, digits, parts, after=3)
    folder = CheckpointFolder(parts.storage, config.run_id)
    last = folder.load_last()
    older = {name: tensor for name, tensor in last.tensors.items() if not name.startswith("dynamics.")}
    folder.save_last(Checkpoint(older, last.facts))
    perform_run(config, digits, parts, device=CPU)
    assert parts.read("dynamics").equals(whole.read("dynamics"))
