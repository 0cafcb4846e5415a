"""Runs with dropout: what they train, what they measure and what they write."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from memlib.batches import images_as_trained, normalize
from memlib.checkpoints import CheckpointFolder, load_model_state
from memlib.config import DropoutConfig, RunConfig, build_config
from memlib.control_dropouts import ChannelDropout, SparseChannels, check_widths, insert_dropout
from memlib.datasets import load_dataset
from memlib.dropout_modes import mode_accuracies, predict_by_mode
from memlib.errors import InputError
from memlib.evaluation import evaluation_mode, predict_in_mode
from memlib.example_tied_dropout import dropout_layers, dropout_mode, set_mode, tie
from memlib.models import ResNet9
from memlib.recalibration import recalibrate
from memlib.results import create_results
from memlib.runs import build_network, perform_run, prepare_data
from memlib.training import training_step
from memlib.training_state import TrainingData, TrainingState

CPU = torch.device("cpu")
TIED = DropoutConfig(kind="example_tied", p_gen=0.3, p_mem=0.2)


def tied_run(small_run, dropout=TIED, epochs=1):
    return replace(small_run, dropout=dropout, training=replace(small_run.training, epochs=epochs))


def start(config, digits):
    data = prepare_data(config, digits)
    train_set = replace(data.train, labels=data.noisy_labels.labels)
    return build_network(config, digits), TrainingData(train_set, data.noisy_labels.is_noisy, data.test, "digest")


def warmed_up(model, data):
    """The model with BatchNorm statistics of real images under tied masks."""
    model.train()
    model(normalize(data.train.images[:64]), ids=data.train.ids[:64])
    return model.eval()


def test_a_run_with_example_tied_dropout_writes_its_modes(digits, small_run, tmp_path):
    config, store = tied_run(small_run), create_results(tmp_path)
    perform_run(config, digits, store, device=CPU)
    assert store.read("runs")["dropout"].to_pylist() == ["example_tied"]
    rows = store.read("dropout").to_pylist()
    variants = {(r["mode"], r["batchnorm"], r["rescaled"]) for r in rows}
    expected = {("tied", "final", False), ("scaled", "final", False), ("dropped", "final", False)}
    assert variants == expected | {("dropped", "final", True), ("dropped", "recalibrated", False)}
    assert {r["split"] for r in rows if r["mode"] == "tied"} == {"clean", "noisy"}
    assert {(r["split"], r["n"]) for r in rows if r["mode"] == "dropped"} == {
        ("clean", 160),
        ("noisy", 40),
        ("test", 60),
    }
    examples = store.read("examples").to_pylist()
    assert {(r["mode"], r["split"]) for r in examples} == {
        ("tied", "train"),
        *((mode, split) for mode in ("scaled", "dropped") for split in ("train", "test")),
    }
    for mode, split in (("tied", "noisy"), ("dropped", "clean"), ("scaled", "test")):
        chosen = [r for r in examples if r["mode"] == mode and split == _split(r)]
        right = sum(r["prediction"] == r["assigned"] for r in chosen) / len(chosen)
        main = [
            r for r in rows if (r["mode"], r["batchnorm"], r["rescaled"], r["split"]) == (mode, "final", False, split)
        ]
        assert right == pytest.approx(main[0]["accuracy"])
    last = {r["split"]: r["accuracy"] for r in store.read("epochs").to_pylist() if r["epoch"] == 1}
    before = {r["split"]: r["accuracy"] for r in rows if r["mode"] == ("scaled" if r["split"] == "test" else "tied")}
    assert last == pytest.approx(before)  # a learning curve is under tied masks, of test examples scaled


def _split(row):
    return "test" if row["split"] == "test" else "noisy" if row["is_noisy"] else "clean"


@pytest.mark.parametrize("kind", ["standard", "channel", "sparse"])
def test_a_control_run_writes_its_plain_accuracies(digits, small_run, tmp_path, kind):
    config, store = tied_run(small_run, DropoutConfig(kind=kind, p_gen=0.5)), create_results(tmp_path)
    perform_run(config, digits, store, device=CPU)
    assert store.read("runs")["dropout"].to_pylist() == [kind]
    rows = store.read("dropout").to_pylist()
    assert {(r["mode"], r["split"]) for r in rows} == {("plain", split) for split in ("clean", "noisy", "test")}
    assert set(store.read("examples")["mode"].to_pylist()) == {"plain"}


def test_a_run_without_dropout_writes_no_modes(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(tied_run(small_run, DropoutConfig()), digits, store, device=CPU)
    assert store.read("dropout").num_rows == 0
    assert store.read("runs")["dropout"].to_pylist() == ["none"]


def test_a_tied_run_interrupted_and_resumed_equals_uninterrupted_to_the_bit(digits, small_run, tmp_path):
    config = tied_run(small_run, epochs=2)
    whole, parts = create_results(tmp_path / "whole"), create_results(tmp_path / "parts")
    perform_run(config, digits, whole, device=CPU)

    def interrupt(record):
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform_run(config, digits, parts, device=CPU, on_epoch=interrupt)
    perform_run(config, digits, parts, device=CPU)
    assert whole.read("dynamics").equals(parts.read("dynamics"))
    assert whole.read("examples").equals(parts.read("examples"))
    assert whole.read("gradients").equals(parts.read("gradients"))


def test_a_step_hands_each_example_its_own_id(digits, small_run):
    model, data = start(tied_run(small_run), digits)
    seen = []
    dropout_layers(model)[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.ids.clone()))
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.0), "float32")
    chosen = torch.tensor([7, 3, 11])
    batch = (normalize(data.train.images[chosen]), data.train.labels[chosen], data.is_noisy[chosen])
    training_step(state, batch, device=CPU, ids=data.train.ids[chosen])
    assert torch.equal(seen[0], data.train.ids[chosen])


def test_predictions_in_a_mode_equal_one_example_at_a_time(digits, small_run):
    model, data = start(tied_run(small_run), digits)
    warmed_up(model, data)
    few = data.train.take(torch.arange(7))
    for mode in ("tied", "scaled", "dropped"):
        got = predict_in_mode(model, few, mode=mode, device=CPU, batch_size=3)
        set_mode(model, mode)
        for i in range(len(few)):
            ids = {"ids": few.ids[i : i + 1]} if mode == "tied" else {}
            logits = model(normalize(few.images[i : i + 1]), **ids)[0]
            assert got.prediction[i] == logits.argmax()
        assert {layer.mode for layer in dropout_layers(model)} == {mode}


def test_measuring_the_modes_leaves_the_model_alone(digits, small_run):
    model, data = start(tied_run(small_run), digits)
    warmed_up(model, data).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = predict_by_mode(model, data, device=CPU)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert {(layer.mode, layer.rescale) for layer in dropout_layers(model)} == {("tied", False)}
    assert model.training
    assert len(mode_accuracies(found, data)) == 2 + 4 * 3


def test_recalibrated_statistics_are_those_of_the_activations_in_that_mode(digits, small_run):
    model, data = start(tied_run(small_run), digits)
    warmed_up(model, data)
    images = data.train.images[:50]
    with dropout_mode(model, "dropped"):
        recalibrated = recalibrate(model, images, device=CPU, batch_size=50)
    seen = {}
    recalibrated.conv2.norm.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    recalibrated(normalize(images))
    first = recalibrated.conv1.norm
    torch.testing.assert_close(first.running_mean, recalibrated.conv1.conv(normalize(images)).mean(dim=(0, 2, 3)))
    assert int(first.num_batches_tracked) == 1
    assert not torch.equal(recalibrated.conv2.norm.running_mean, model.conv2.norm.running_mean)
    # the first norm divided by the batch's biased variance then and by the unbiased one now
    torch.testing.assert_close(
        recalibrated.conv2.norm.running_mean, seen["x"].mean(dim=(0, 2, 3)), rtol=0.01, atol=1e-3
    )


def test_a_run_that_augments_is_recalibrated_on_augmented_images(digits, small_run, tmp_path):
    config, store = tied_run(small_run, epochs=3), create_results(tmp_path)
    config = replace(config, training=replace(config.training, augment=("crop",)))
    perform_run(config, digits, store, device=CPU)
    model, data = start(config, digits)
    load_model_state(model, CheckpointFolder(store.storage, config.run_id).load_epoch(3).tensors, where="of the run")

    def recalibrated_on(images):
        found = predict_by_mode(model, data, device=CPU, calibration=images)
        return {r.split: r.accuracy for r in mode_accuracies(found, data) if r.batchnorm == "recalibrated"}

    rows = [r for r in store.read("dropout").to_pylist() if r["batchnorm"] == "recalibrated"]
    cropped = recalibrated_on(images_as_trained(data.train.images, config.training, seed=config.seed))
    assert {r["split"]: r["accuracy"] for r in rows} == pytest.approx(cropped)
    assert cropped != recalibrated_on(None)


def test_recalibration_needs_batchnorm(digits):
    with pytest.raises(InputError, match="has no BatchNorm whose statistics could be recalibrated"):
        recalibrate(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), digits.train.images, device=CPU)


def test_channel_dropout_drops_whole_channels_anew_and_keeps_the_mean():
    layer = ChannelDropout(0.72)
    for shape in ((200, 50, 2, 2), (200, 3, 50), (200, 50)):
        torch.manual_seed(0)
        out = layer(torch.ones(shape))
        by_channel = (out if len(shape) == 3 else out.movedim(1, -1)).reshape(200, -1, 50)
        assert torch.equal(by_channel, by_channel[:, :1].expand_as(by_channel))
        assert out.unique().tolist() == pytest.approx([0, 1 / 0.28])
        assert out.mean().item() == pytest.approx(1, abs=0.05)
        assert not torch.equal(layer(torch.ones(shape)), out)
    with evaluation_mode(layer):
        assert torch.equal(layer(torch.ones(2, 5)), torch.ones(2, 5))


def test_the_sparse_network_is_the_dropped_one_from_the_start():
    torch.manual_seed(0)
    model = ResNet9(in_channels=1, num_classes=3, width=0.125).eval()
    sparse = insert_dropout(model, DropoutConfig(kind="sparse", p_gen=0.25), seed=0).eval()
    tied = tie(model, p_gen=0.25)
    x = torch.randn(3, 1, 12, 12)
    with dropout_mode(tied, "dropped"):
        torch.testing.assert_close(sparse(x), tied(x))
    assert len([m for m in sparse.modules() if isinstance(m, SparseChannels)]) == 6


def test_controls_leave_off_as_many_units_as_example_tied_dropout():
    model = ResNet9(in_channels=1, num_classes=3, width=0.125)
    for kind, layer in (("standard", nn.Dropout), ("channel", ChannelDropout)):
        made = insert_dropout(model, DropoutConfig(kind=kind, p_gen=0.2, p_mem=0.1), seed=0)
        assert [m.p for m in made.modules() if isinstance(m, layer)] == [pytest.approx(0.72)] * 6
        made = insert_dropout(model, DropoutConfig(kind=kind, p_drop=0.4, after=("conv3",)), seed=0)
        assert [m.p for m in made.modules() if isinstance(m, layer)] == [0.4]
    assert insert_dropout(model, DropoutConfig(), seed=0) is model


@pytest.mark.parametrize("kind", ["example_tied", "sparse"])
def test_a_run_whose_layers_are_too_narrow_is_refused_before_training(digits, small_run, kind):
    config = tied_run(small_run, DropoutConfig(kind=kind, p_gen=0.1))
    with pytest.raises(InputError, match="layer 'conv1' has 4 channels, too few .* make it at least 6 wide"):
        build_network(config, digits)
    wide_enough = ResNet9(in_channels=1, num_classes=3, width=0.125)
    check_widths(tie(wide_enough, p_gen=0.1), (1, 12, 12))


def test_masks_follow_from_the_seed_of_the_run(digits, small_run):
    keys = [
        [layer.key for layer in dropout_layers(build_network(replace(tied_run(small_run), seed=seed), digits))]
        for seed in (0, 0, 1)
    ]
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])
    assert len(set(keys[0])) == 6


def test_memorization_is_confined_to_the_neurons_that_are_dropped(tmp_path):
    """Real digits: wrong labels are memorized under tied masks, and forgotten when they are dropped."""
    settings = {
        "data": {"name": "digits", "image_size": 16, "limit": 500},
        "model": {"width": 0.25},
        "dropout": {"kind": "example_tied", "p_gen": 0.25, "p_mem": 0.1},
        "training": {"epochs": 15, "batch_size": 20, "peak_lr": 0.1, "schedule": "one_cycle", "warmup": 0.3},
    }
    store = create_results(tmp_path)
    perform_run(build_config(RunConfig, settings), load_dataset("digits", image_size=16), store, device=CPU)
    found = {
        (r["mode"], r["split"]): r["accuracy"]
        for r in store.read("dropout").to_pylist()
        if r["batchnorm"] == "final" and not r["rescaled"]
    }
    assert found["tied", "clean"] > 0.99
    assert found["tied", "noisy"] >= 0.96  # of 50: rounding, and so the machine, moves an example or two
    assert found["dropped", "noisy"] <= 0.06
    assert found["dropped", "clean"] > 0.95
    assert found["dropped", "test"] > 0.9
