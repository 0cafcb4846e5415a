"""What a run holds out to be validated on, and one trial of a search judged by it."""

from dataclasses import replace

import pytest
import torch

from memlib.batches import images_as_trained
from memlib.checkpoints import CheckpointFolder
from memlib.config import CheckpointConfig, DataConfig, DropoutConfig, RunConfig
from memlib.datasets import Dataset, ImageSet, draw_holdout
from memlib.dropout_modes import predict_by_mode
from memlib.errors import InputError
from memlib.evaluation import accuracy, predict_in_mode
from memlib.example_tied_dropout import dropout_mode
from memlib.holdings import check_same_images
from memlib.model_selection import best_setting, controls_of, gains_on_test
from memlib.recalibration import recalibrate
from memlib.results import create_results
from memlib.runs import build_network, perform_run, place_data, prepare_data
from memlib.seeds import stream
from memlib.storage import open_storage
from memlib.training import evaluate_held_out, train
from memlib.training_state import TrainingData
from memlib.trials import TABLE, conclude_trial, perform_trial, trial_unit

CPU = torch.device("cpu")
TIED = DropoutConfig(kind="example_tied", p_gen=0.3, p_mem=0.2)


@pytest.fixture
def held_out_run(small_run):
    """The small run with a quarter of its 200 images held out, as a trial is."""
    data = replace(small_run.data, holdout=0.25)
    training = replace(small_run.training, gradient_accounting=False)
    return replace(small_run, data=data, training=training, dropout=TIED, checkpoints=CheckpointConfig(epochs=()))


# The held-out split


def test_nothing_held_out_is_the_run_there_was():
    assert RunConfig(data=DataConfig(holdout=None)).run_id == RunConfig().run_id
    assert RunConfig(data=DataConfig(holdout=0.1)).run_id != RunConfig().run_id


def test_what_is_held_out_and_what_is_trained_on_are_the_run_without_holdout_cut_in_two(digits, held_out_run):
    whole = prepare_data(replace(held_out_run, data=replace(held_out_run.data, holdout=None)), digits)
    data = prepare_data(held_out_run, digits)
    assert (len(data.train), len(data.held_out)) == (150, 50)
    found = {}
    for i in range(150):
        found[int(data.train.ids[i])] = (data.train.images[i], data.noisy_labels.labels[i])
    for i in range(50):
        assert int(data.held_out.ids[i]) not in found
        found[int(data.held_out.ids[i])] = (data.held_out.images[i], data.held_out.labels[i])
    assert len(found) == 200
    for i in range(200):
        image, label = found[int(whole.train.ids[i])]
        assert torch.equal(image, whole.train.images[i])
        assert label == whole.noisy_labels.labels[i]  # the noise is drawn before the split
    assert data.noisy_labels.is_noisy.equal(data.noisy_labels.labels != data.noisy_labels.original)
    assert data.noisy_labels.original.equal(data.train.labels)


def test_held_out_labels_are_as_noisy_as_the_others(digits, held_out_run):
    rates = []
    for seed in range(40):
        held_out = prepare_data(replace(held_out_run, seed=seed), digits).held_out
        truth = {int(i): int(label) for i, label in zip(digits.train.ids, digits.train.labels, strict=True)}
        wrong = [int(held_out.labels[k]) != truth[int(held_out.ids[k])] for k in range(len(held_out))]
        rates.append(sum(wrong) / len(wrong))
    assert sum(rates) / 40 == pytest.approx(held_out_run.noise.fraction, abs=0.03)  # 4 standard errors
    assert len(set(rates)) > 1


def test_what_is_held_out_follows_from_the_seed_and_shifts_no_other_draw(digits, held_out_run):
    ids = [prepare_data(replace(held_out_run, seed=seed), digits).held_out.ids.tolist() for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    kept, held_out = draw_holdout(200, 0.25, stream(0, "holdout"))
    assert digits.train.ids[held_out].tolist() == ids[0]
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(200))


def test_the_share_is_read_as_a_decimal():
    assert len(draw_holdout(100, 0.29, stream(0, "holdout"))[1]) == 29  # in binary 28.999...


def test_a_run_trains_on_the_kept_examples_alone(digits, held_out_run, tmp_path):
    """The reference: training on a data set that never had the others."""
    data = prepare_data(held_out_run, digits)
    assigned = replace(data.train, labels=data.noisy_labels.labels)
    without = TrainingData(assigned, data.noisy_labels.is_noisy, digits.test, "digest")
    expected = build_network(held_out_run, digits)
    folder = CheckpointFolder(open_storage(tmp_path / "reference"), "r")
    for _ in train(expected, without, held_out_run, device=CPU, checkpoints=folder):
        pass
    store = create_results(tmp_path / "results")
    perform_run(held_out_run, digits, store, device=CPU)
    got = CheckpointFolder(store.storage, held_out_run.run_id).load_epoch(3).tensors
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.state_dict().items())
    rows = store.read("epochs").to_pylist()
    n_noisy = int(data.noisy_labels.is_noisy.sum())
    n = {"clean": 150 - n_noisy, "noisy": n_noisy, "test": 60, "validation": 50}
    assert {(r["split"], r["n"]) for r in rows} == set(n.items())
    assert not set(data.held_out.ids.tolist()) & {
        r["example_id"] for r in store.read("examples").to_pylist() if r["split"] == "train"
    }
    dropped = accuracy(predict_in_mode(expected, data.held_out, mode="dropped", device=CPU), data.held_out.labels)
    last = [r for r in rows if r["epoch"] == 3 and r["split"] == "validation"]
    assert [(r["accuracy"], r["n"]) for r in last] == [(pytest.approx(dropped.accuracy), 50)]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_holds_out_nothing_or_everything_is_refused(share):
    with pytest.raises(InputError, match="data.holdout is .*; give a share of the training set in"):
        DataConfig(holdout=share)


def test_a_share_that_is_less_than_one_example_is_refused(digits, held_out_run):
    config = replace(held_out_run, data=replace(held_out_run.data, holdout=0.001))
    with pytest.raises(InputError, match="holds out 0 of 200 training images"):
        prepare_data(config, digits)


def test_a_batch_is_no_larger_than_what_is_left(digits, held_out_run):
    config = replace(held_out_run, training=replace(held_out_run.training, batch_size=151))
    with pytest.raises(InputError, match="batch_size is 151 but digits has 150 training images"):
        prepare_data(config, digits)


def test_nothing_held_out_cannot_be_judged(digits, small_run):
    data = place_data(prepare_data(small_run, digits), "digest", CPU)
    with pytest.raises(InputError, match="nothing is held out to validate on; set data.holdout"):
        evaluate_held_out(build_network(small_run, digits), data, device=CPU)


# One trial


def rows_of(store):
    found = store.read(TABLE).to_pylist()
    return {row["batchnorm"]: row for row in found}


class Stop(Exception):
    pass


def stop_after(epoch):
    def on_epoch(record):
        if record.epoch == epoch:
            raise Stop

    return on_epoch


def reference(run, digits, tmp_path, epochs):
    """The network after so many epochs of a run, and its data."""
    model, data = build_network(run, digits), place_data(prepare_data(run, digits), digits.digest, CPU)
    epochs_of = train(model, data, run, device=CPU, checkpoints=CheckpointFolder(open_storage(tmp_path), "reference"))
    curve = [next(epochs_of).accuracies["validation"].accuracy for _ in range(epochs + 1)]
    return model, data, curve


def expected_accuracies(model, data):
    """The accuracies in mode dropped and, of test examples, scaled, as the modes of a finished run have them."""
    found = {
        (p.variant.mode, p.variant.is_main, p.variant.batchnorm): p for p in predict_by_mode(model, data, device=CPU)
    }
    dropped, scaled = found["dropped", True, "final"], found["scaled", True, "final"]
    return {
        "clean_accuracy": accuracy(dropped.train, data.train.labels, ~data.is_noisy).accuracy,
        "noisy_accuracy": accuracy(dropped.train, data.train.labels, data.is_noisy).accuracy,
        "test_accuracy": accuracy(dropped.test, data.test.labels).accuracy,
        "scaled_test_accuracy": accuracy(scaled.test, data.test.labels).accuracy,
    }


@pytest.mark.parametrize("augment", [(), ("crop",)])
def test_a_finished_trial_is_judged_as_the_run_with_its_settings_would_be(digits, held_out_run, tmp_path, augment):
    held_out_run = replace(held_out_run, training=replace(held_out_run.training, augment=augment))
    store = create_results(tmp_path / "results")
    perform_trial(held_out_run, digits, store, device=CPU)
    model, data, curve = reference(held_out_run, digits, tmp_path / "reference", 3)
    found = rows_of(store)
    final = found["final"]
    assert final["validation_curve"] == curve
    assert final["validation_accuracy"] == curve[-1]
    assert (final["epochs"], final["stopped_early"], final["n_validation"]) == (3, False, 50)
    assert {k: final[k] for k in expected_accuracies(model, data)} == pytest.approx(expected_accuracies(model, data))
    with dropout_mode(model, "dropped"):
        calibration = images_as_trained(data.train.images, held_out_run.training, seed=held_out_run.seed)
        again = recalibrate(model, calibration, device=CPU)
    expected = accuracy(predict_in_mode(again, data.held_out, mode="dropped", device=CPU), data.held_out.labels)
    assert found["recalibrated"]["validation_accuracy"] == pytest.approx(expected.accuracy)
    assert found["recalibrated"]["validation_curve"] is None
    assert store.read("runs").num_rows == 0
    assert store.read("units")["status"].to_pylist() == ["done"]
    assert CheckpointFolder(store.storage, trial_unit(held_out_run).unit_id).epochs() == (3,)


def test_a_trial_stopped_early_is_judged_as_its_last_epoch_left_it(digits, held_out_run, tmp_path):
    store = create_results(tmp_path / "results")
    with pytest.raises(Stop):
        perform_trial(held_out_run, digits, store, device=CPU, on_epoch=stop_after(2))
    assert rows_of(store) == {}
    conclude_trial(held_out_run, digits, store, device=CPU)
    model, data, curve = reference(held_out_run, digits, tmp_path / "reference", 2)
    found = rows_of(store)
    assert set(found) == {"final"}
    final = found["final"]
    assert (final["epochs"], final["stopped_early"], final["validation_curve"]) == (2, True, curve)
    assert {k: final[k] for k in expected_accuracies(model, data)} == pytest.approx(expected_accuracies(model, data))
    left = CheckpointFolder(store.storage, trial_unit(held_out_run).unit_id)
    assert (left.epochs(), left.load_last()) == ((), None)
    conclude_trial(held_out_run, digits, store, device=CPU)  # a task that is repeated
    assert store.read(TABLE).num_rows == 1


def test_an_interrupted_trial_continues_and_ends_with_the_same_row(digits, held_out_run, tmp_path):
    whole, parts = create_results(tmp_path / "whole"), create_results(tmp_path / "parts")
    perform_trial(held_out_run, digits, whole, device=CPU)
    with pytest.raises(Stop):
        perform_trial(held_out_run, digits, parts, device=CPU, on_epoch=stop_after(1))
    reported = []
    perform_trial(held_out_run, digits, parts, device=CPU, on_epoch=reported.append)
    assert [set(record.accuracies) for record in reported] == [{"validation"}] * 4
    assert rows_of(parts) == rows_of(whole)


def test_a_trial_killed_before_its_row_has_its_row_in_units_and_is_judged_again(
    digits, held_out_run, tmp_path, kill_after_writes, monkeypatch
):
    store = create_results(tmp_path)
    with pytest.raises(Stop):
        perform_trial(held_out_run, digits, store, device=CPU, on_epoch=stop_after(2))
    kill_after_writes(1)
    with pytest.raises(KeyboardInterrupt):
        conclude_trial(held_out_run, digits, store, device=CPU)
    assert store.units(TABLE) == set()
    assert len(store.units("units")) == 1
    monkeypatch.undo()
    conclude_trial(held_out_run, digits, store, device=CPU)
    assert store.units(TABLE) == store.units("units")


def test_the_control_has_no_shares_and_no_modes(digits, held_out_run, tmp_path):
    store = create_results(tmp_path)
    perform_trial(replace(held_out_run, dropout=DropoutConfig()), digits, store, device=CPU)
    (row,) = store.read(TABLE).to_pylist()
    assert (row["dropout"], row["p_gen"], row["p_mem"], row["scaled_test_accuracy"]) == ("none", None, None, None)
    assert row["validation_curve"][-1] == row["validation_accuracy"]


def test_a_trial_that_left_no_state_cannot_be_judged(digits, held_out_run, tmp_path):
    with pytest.raises(InputError, match="left no state to judge; run the search again"):
        conclude_trial(held_out_run, digits, create_results(tmp_path), device=CPU)


def test_trials_on_other_images_of_the_same_name_are_refused(digits, held_out_run, tmp_path):
    store = create_results(tmp_path)
    perform_trial(replace(held_out_run, dropout=DropoutConfig()), digits, store, device=CPU)
    others = Dataset("digits", digits.train.take(torch.arange(150)), digits.test, digits.class_names)
    check_same_images(held_out_run, digits, store)
    with pytest.raises(InputError, match="holds runs on other images that were also called digits"):
        check_same_images(held_out_run, others, store)


# The choice


def test_what_a_trial_is_chosen_by_depends_on_neither_the_test_set_nor_which_labels_are_wrong(
    digits, held_out_run, tmp_path, monkeypatch
):
    plain, blinded = create_results(tmp_path / "plain"), create_results(tmp_path / "blinded")
    perform_trial(held_out_run, digits, plain, device=CPU)

    def prepare_with_another_truth(config, dataset):
        data = prepare_data(config, dataset)
        return replace(data, noisy_labels=replace(data.noisy_labels, is_noisy=~data.noisy_labels.is_noisy))

    monkeypatch.setattr("memlib.trials.prepare_data", prepare_with_another_truth)
    test = digits.test
    other_test = ImageSet(test.images.flip(0), test.labels.roll(1), test.ids)
    perform_trial(held_out_run, replace(digits, test=other_test), blinded, device=CPU)
    judged, judged_blinded = rows_of(plain), rows_of(blinded)
    for kind, found in judged.items():
        for name in ("validation_accuracy", "validation_curve"):
            assert found[name] == judged_blinded[kind][name]
    measured = ("clean_accuracy", "noisy_accuracy", "test_accuracy", "scaled_test_accuracy")
    truths, others = ([[row[name] for name in measured] for row in rows.values()] for rows in (judged, judged_blinded))
    assert truths != others


class Blind(dict):
    """A row whose measures that must not be chosen by cannot be looked at."""

    def __getitem__(self, name):
        assert not name.startswith(("clean_", "noisy_", "test_", "scaled_")), name
        return super().__getitem__(name)


def row(p_gen, validation, *, test=0.5, **facts):
    axes = {"p_gen": p_gen, "p_mem": 0.1, "width": 0.5, "after": "", "peak_lr": 0.1, "batchnorm": "final"}
    measures = {"validation_accuracy": validation, "test_accuracy": test, "n_validation": 1000}
    return {"dropout": "example_tied", "seed": 0, "stopped_early": False, **axes, **measures, **facts}


def test_the_best_setting_has_the_highest_mean_validation_accuracy_over_seeds_and_is_chosen_blindly():
    rows = [
        row(0.1, 0.9, seed=0, test=0.9),
        row(0.1, 0.6, seed=1, test=0.9),
        row(0.2, 0.8, seed=1, test=0.1),
        row(0.2, 0.8, seed=0, test=0.1),
        row(0.2, 0.7, seed=0, batchnorm="recalibrated"),
        row(0.3, 0.95, seed=0),  # one seed of two
        row(0.4, 0.99, seed=0, stopped_early=True),
        row(None, 0.99, seed=0, dropout="none"),
    ]
    best = best_setting(map(Blind, rows))
    assert [(r["p_gen"], r["batchnorm"], r["seed"]) for r in best] == [(0.2, "final", 0), (0.2, "final", 1)]
    assert best_setting(map(Blind, reversed(rows))) == best


def test_there_is_no_best_setting_before_a_trial_has_ended():
    assert best_setting([row(0.4, 0.9, stopped_early=True), row(None, 0.9, dropout="none")]) == []


def test_the_gain_is_over_the_control_of_the_same_width_rate_and_seed():
    chosen = [row(0.2, 0.8, seed=0, test=0.75), row(0.2, 0.8, seed=1, test=0.5), row(0.2, 0.8, seed=2, test=0.1)]
    controls = [row(None, 0.7, dropout="none", seed=seed, test=0.5) for seed in (1, 0)]
    others = [row(None, 0.7, dropout="none", test=0.1, width=1.0)]
    assert controls_of(chosen, [*others, *controls]) == controls[::-1]
    assert gains_on_test(chosen, [*others, *controls]) == [0.25, 0.0]
