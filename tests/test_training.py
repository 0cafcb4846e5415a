"""The training loop against a plain one written here, and interrupted against uninterrupted."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlib.batches import epoch_order, normalize, split_order
from memlib.checkpoints import CheckpointFolder
from memlib.config import ModelConfig, NoiseConfig, RunConfig
from memlib.datasets import Dataset
from memlib.errors import InputError
from memlib.holdings import check_same_images, holdings, is_finished
from memlib.models import build_model
from memlib.results import create_results
from memlib.runs import perform_run, prepare_data, record_failure
from memlib.schedules import learning_rate
from memlib.storage import open_storage
from memlib.training import Diverged, plain_step, train, training_step
from memlib.training_state import TrainingData, TrainingState

CPU = torch.device("cpu")


def start(config, digits):
    data = prepare_data(config, digits)
    train_set = replace(data.train, labels=data.noisy_labels.labels)
    model = build_model(config.model, image_shape=digits.image_shape, num_classes=10, seed=config.seed)
    return model, TrainingData(train_set, data.noisy_labels.is_noisy, data.test, digits.digest)


def without_seconds(records):
    return [replace(record, seconds=0.0) for record in records]


def test_training_equals_a_plain_loop_that_accounts_for_nothing(digits, small_run, tmp_path):
    model, data = start(small_run, digits)
    plain = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    settings = small_run.training
    batches = [
        batch
        for epoch in range(1, settings.epochs + 1)
        for batch in split_order(epoch_order(len(data.train), seed=0, epoch=epoch), settings.batch_size)
    ]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step=step, steps=len(batches))
        optimizer.zero_grad()
        F.cross_entropy(plain(normalize(data.train.images[batch])), data.train.labels[batch]).backward()
        optimizer.step()
    list(train(model, data, small_run, device=CPU, checkpoints=CheckpointFolder(open_storage(tmp_path), "r")))
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-3, atol=1e-4)


def plainly(config, **settings):
    """The run without gradient accounting."""
    return replace(config, training=replace(config.training, gradient_accounting=False, **settings))


@pytest.mark.usefixtures("shallow_vit")
@pytest.mark.parametrize(("kind", "interruptions"), [("resnet9", [0, 1, 2]), ("vit", [1]), ("plain", [1, 2])])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(digits, small_run, tmp_path, kind, interruptions):
    config = replace(small_run, model=ModelConfig(name="vit")) if kind == "vit" else small_run
    config = plainly(config, evaluate_every=2) if kind == "plain" else config
    digits = _few(digits) if kind == "vit" else digits
    whole_model, data = start(config, digits)
    folder = CheckpointFolder(open_storage(tmp_path / "whole"), "r")
    whole = list(train(whole_model, data, config, device=CPU, checkpoints=folder))
    folder = CheckpointFolder(open_storage(tmp_path / "parts"), "r")
    for finished in interruptions:
        interrupted_model, _ = start(config, digits)
        epochs = train(interrupted_model, data, config, device=CPU, checkpoints=folder)
        for _ in range(finished + 1):
            next(epochs)
        epochs.close()
    resumed_model, _ = start(config, digits)
    resumed = list(train(resumed_model, data, config, device=CPU, checkpoints=folder))
    assert without_seconds(resumed) == without_seconds(whole)
    for name, tensor in whole_model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], tensor), name


def _few(digits):
    return replace(digits, train=digits.train.take(torch.arange(40)), test=digits.test.take(torch.arange(10)))


def test_training_without_accounting_is_the_same_training_and_records_no_gradients(digits, small_run, tmp_path):
    states = []
    for config in (small_run, plainly(small_run)):
        model, data = start(config, digits)
        folder = CheckpointFolder(open_storage(tmp_path), config.run_id)
        records = list(train(model, data, config, device=CPU, checkpoints=folder))
        states.append(model.state_dict())
    assert {record.gradients for record in records} == {()}
    for name, accounted in states[0].items():
        torch.testing.assert_close(states[1][name], accounted, rtol=1e-3, atol=1e-4)


def test_only_every_so_many_epochs_are_evaluated_the_first_and_the_last_always(digits, small_run, tmp_path):
    store, config = create_results(tmp_path), plainly(small_run, epochs=3, evaluate_every=2)
    every = {e.epoch: e for e in train(*start(small_run, digits), small_run, device=CPU, checkpoints=_folder(store))}
    reported = []
    perform_run(config, digits, store, device=CPU, on_epoch=reported.append)
    assert [record.epoch for record in reported] == [0, 1, 2, 3]
    assert [bool(record.accuracies) for record in reported] == [True, False, True, True]
    rows = store.read("epochs").to_pylist()
    assert {row["epoch"] for row in rows} == {0, 2, 3}
    for row in rows:
        assert row["loss"] == pytest.approx(every[row["epoch"]].accuracies[row["split"]].loss, rel=1e-3)
    assert store.read("gradients").num_rows == 0


def _folder(store):
    return CheckpointFolder(store.storage, "another")


@pytest.mark.usefixtures("shallow_vit")
def test_training_leaves_the_global_random_stream_untouched(digits, small_run, tmp_path):
    config = replace(small_run, model=ModelConfig(name="vit"), training=replace(small_run.training, epochs=1))
    digits = _few(digits)
    before = torch.get_rng_state()
    perform_run(config, digits, create_results(tmp_path), device=CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_epoch_zero_is_the_state_before_training(digits, small_run, tmp_path):
    model, data = start(small_run, digits)
    initial = copy.deepcopy(model.state_dict())
    folder = CheckpointFolder(open_storage(tmp_path), "r")
    first = next(train(model, data, small_run, device=CPU, checkpoints=folder))
    assert first.epoch == 0
    assert first.gradients == ()
    assert all(torch.equal(folder.load_epoch(0).tensors[name], t) for name, t in initial.items())


def test_a_run_writes_its_tables_keeps_its_checkpoints_and_nothing_else(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    folder = CheckpointFolder(store.storage, small_run.run_id)
    assert folder.epochs() == (0, 2, 3)
    assert folder.load_last() is None
    run = store.read("runs").to_pylist()[0]
    assert (run["status"], run["error"], run["dataset"], run["noise_fraction"]) == ("done", None, "digits", 0.2)
    epochs = store.read("epochs").to_pylist()
    assert {(r["epoch"], r["split"]) for r in epochs} == {(e, s) for e in range(4) for s in ("clean", "noisy", "test")}
    assert {r["n"] for r in epochs if r["split"] == "noisy"} == {40}
    assert store.read("gradients").num_rows == 3 * 9
    assert is_finished(small_run, holdings(store))


def test_the_examples_table_agrees_with_the_last_epoch_and_with_the_noise(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    examples = store.read("examples").to_pylist()
    last = {r["split"]: r["accuracy"] for r in store.read("epochs").to_pylist() if r["epoch"] == 3}
    parts = {
        "clean": [r for r in examples if r["split"] == "train" and not r["is_noisy"]],
        "noisy": [r for r in examples if r["is_noisy"]],
        "test": [r for r in examples if r["split"] == "test"],
    }
    for split, rows in parts.items():
        assert sum(r["prediction"] == r["assigned"] for r in rows) / len(rows) == pytest.approx(last[split])
    assert all((r["assigned"] != r["original"]) == r["is_noisy"] for r in examples)
    assert {r["example_id"] for r in examples if r["split"] == "train"} == set(digits.train.ids.tolist())


def test_a_limit_trains_on_a_seeded_balanced_subset(digits, small_run):
    config = replace(small_run, data=replace(small_run.data, limit=50))
    first, again = prepare_data(config, digits), prepare_data(config, digits)
    assert torch.equal(first.train.ids, again.train.ids)
    assert first.train.labels.bincount(minlength=10).tolist() == [5] * 10
    other = prepare_data(replace(config, seed=1), digits)
    assert not torch.equal(first.train.ids, other.train.ids)


def test_without_noise_there_is_no_noisy_split(digits, small_run, tmp_path):
    config = replace(small_run, noise=replace(small_run.noise, fraction=0.0))
    store = create_results(tmp_path)
    perform_run(config, digits, store, device=CPU)
    assert set(store.read("epochs")["split"].to_pylist()) == {"clean", "test"}
    assert set(store.read("gradients")["cosine"].to_pylist()) == {None}


def test_a_diverged_run_stops_at_once_and_says_what_to_change(digits, small_run, tmp_path):
    config = replace(small_run, training=replace(small_run.training, peak_lr=1e30, warmup=0.0))
    store = create_results(tmp_path)
    with pytest.raises(Diverged, match=r"no longer finite in epoch 1 of 3; lower training.peak_lr \(now 1e\+30\)"):
        perform_run(config, digits, store, device=CPU)
    record_failure(config, store, device=CPU, error="it diverged")
    run = store.read("runs").to_pylist()[0]
    assert (run["status"], run["error"], run["seconds"]) == ("failed", "it diverged", None)
    assert not is_finished(config, holdings(store))


def test_a_state_that_is_not_finite_is_never_kept(digits, small_run, tmp_path):
    """With one step an epoch and no evaluation the loss itself is finite until the step after."""
    training = replace(small_run.training, peak_lr=1e30, warmup=0.0, evaluate_every=3, batch_size=200)
    config = replace(small_run, training=training, checkpoints=replace(small_run.checkpoints, epochs=(1, 2)))
    model, data = start(config, digits)
    folder = CheckpointFolder(open_storage(tmp_path), "r")
    with pytest.raises(Diverged):
        list(train(model, data, config, device=CPU, checkpoints=folder))
    again, _ = start(config, digits)
    with pytest.raises(Diverged):  # and no error about the state it continues from
        list(train(again, data, config, device=CPU, checkpoints=folder))


def test_a_repetition_that_was_killed_is_no_finished_run(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    wanted = replace(small_run, checkpoints=replace(small_run.checkpoints, epochs=(1,)))
    model, data = start(wanted, digits)
    epochs = train(model, data, wanted, device=CPU, checkpoints=CheckpointFolder(store.storage, wanted.run_id))
    for _ in range(3):
        next(epochs)  # epochs 0 to 2 of the repetition beside epoch 3 of the first training
    assert CheckpointFolder(store.storage, wanted.run_id).epochs() == (0, 1, 2, 3)
    assert not is_finished(wanted, holdings(store))
    perform_run(wanted, digits, store, device=CPU)
    assert is_finished(wanted, holdings(store))


def test_a_finished_run_that_kept_fewer_checkpoints_than_wanted_is_wanted_again(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    wanted = replace(small_run, checkpoints=replace(small_run.checkpoints, epochs=(1,)))
    assert wanted.run_id == small_run.run_id
    assert not is_finished(wanted, holdings(store))


def test_a_repetition_that_fails_leaves_a_finished_run_finished(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    record_failure(small_run, store, device=None, error="out of luck")
    assert store.finished_runs() == {small_run.run_id}


def test_a_repetition_for_more_checkpoints_keeps_those_there_were(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    wanted = replace(small_run, checkpoints=replace(small_run.checkpoints, epochs=(1,)))
    perform_run(wanted, digits, store, device=CPU)
    assert CheckpointFolder(store.storage, small_run.run_id).epochs() == (0, 1, 2, 3)
    assert is_finished(wanted, holdings(store))


def test_an_interrupted_run_resumed_with_more_checkpoints_keeps_them_all(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    few = replace(small_run, checkpoints=replace(small_run.checkpoints, epochs=()))
    model, data = start(few, digits)
    epochs = train(model, data, few, device=CPU, checkpoints=CheckpointFolder(store.storage, few.run_id))
    for _ in range(3):
        next(epochs)
    perform_run(small_run, digits, store, device=CPU)
    assert is_finished(small_run, holdings(store))


def test_a_run_continues_on_the_same_images_and_in_the_same_precision_only(digits, small_run, tmp_path):
    folder = CheckpointFolder(open_storage(tmp_path), "r")
    model, data = start(small_run, digits)
    next(train(model, data, small_run, device=CPU, checkpoints=folder))
    with pytest.raises(
        InputError, match="was begun with images .* and would continue with other; give the same images"
    ):
        next(train(model, replace(data, digest="other"), small_run, device=CPU, checkpoints=folder))
    other = replace(small_run, training=replace(small_run.training, precision="bfloat16"))
    with pytest.raises(InputError, match="was begun with precision float32 and would continue with bfloat16"):
        next(train(model, data, other, device=CPU, checkpoints=folder))


def test_finished_runs_on_other_images_of_the_same_name_are_noticed(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    check_same_images(small_run, digits, store)
    with pytest.raises(InputError, match="holds runs on other images that were also called digits"):
        check_same_images(replace(small_run, seed=5), _few(digits), store)


class OddLayout(nn.Module):
    """A parameter that the forward pass uses transposed, so that its gradient comes in another memory layout."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 7, 7, generator=torch.Generator().manual_seed(0)))
        self.position = nn.Parameter(torch.randn(4, 4, 9, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        y = torch.nn.functional.conv2d(x, self.weight.flip(0).transpose(2, 3))
        return y.mean(dim=(2, 3)) + self.position.permute(2, 0, 1).reshape(9, 16)[:3].sum(dim=1)


@pytest.mark.parametrize("accounting", [True, False])
def test_a_step_is_plain_sgd_whatever_the_memory_layout_of_a_parameter(accounting):
    model = OddLayout()
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), "float32")
    expected = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, foreach=False)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        inputs, labels = torch.randn(6, 5, 9, 9, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
        if accounting:
            training_step(state, (inputs, labels, labels == 0), device=CPU)
        else:
            plain_step(state, (inputs, labels), device=CPU)
        expected.zero_grad()
        F.cross_entropy(plain(inputs), labels).backward()
        expected.step()
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist", "svhn", "digits"])
def test_digits_are_never_mirrored(digits, small_run, name):
    training = replace(small_run.training, augment=("flip",))
    config = replace(small_run, training=training, data=replace(small_run.data, name=name))
    with pytest.raises(InputError, match="a mirrored digit is no digit"):
        prepare_data(config, digits)


def test_a_batch_larger_than_the_training_set_is_refused(digits):
    with pytest.raises(ValueError, match="training.batch_size is 512 but digits has 200 training images"):
        prepare_data(RunConfig(), digits)


def test_bfloat16_training_stays_near_float32(digits, small_run, tmp_path):
    """The fast path: losses within 0.05 nats after three epochs."""
    finals = []
    for precision in ("float32", "bfloat16"):
        config = replace(small_run, training=replace(small_run.training, precision=precision))
        model, data = start(config, digits)
        folder = CheckpointFolder(open_storage(tmp_path / precision), "r")
        finals.append(list(train(model, data, config, device=CPU, checkpoints=folder))[-1])
    for split, exact in finals[0].accuracies.items():
        assert finals[1].accuracies[split].loss == pytest.approx(exact.loss, abs=0.05)


def test_bfloat16_accounting_of_one_step_stays_near_float32(digits, small_run):
    """The fast path, from the same weights: norms within 5 %, direction within a cosine of 0.98."""
    found = {}
    for precision in ("float32", "bfloat16"):
        model, data = start(small_run, digits)
        state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True), precision)
        batch = (normalize(data.train.images[:128]), data.train.labels[:128], data.is_noisy[:128])
        _, found[precision] = training_step(state, batch, device=CPU)
    for part in ("clean", "noisy"):
        exact, fast = (torch.cat([g.flatten() for g in getattr(found[p], part)]) for p in ("float32", "bfloat16"))
        assert fast.norm().item() == pytest.approx(exact.norm().item(), rel=0.05)
        assert F.cosine_similarity(exact, fast, dim=0) > 0.98


def test_a_network_with_a_frozen_part_is_refused_before_anything_is_computed(digits, small_run):
    model, data = start(small_run, digits)
    model.conv2.norm.bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"1 parameters of ResNet9 require no gradient \(conv2.norm.bias first\)"):
        next(train(model, data, small_run, device=CPU, checkpoints=None))


def test_label_noise_over_a_class_that_no_image_has_is_refused(digits, small_run):
    without = digits.train.labels != 3
    some = Dataset("some", digits.train.take(without.nonzero().squeeze(1)), digits.test, digits.class_names)
    with pytest.raises(InputError, match=r"1 of the 10 classes .* have no training image, first class 3 \('3'\)"):
        prepare_data(small_run, some)
    assert not prepare_data(replace(small_run, noise=NoiseConfig(fraction=0.0)), some).noisy_labels.is_noisy.any()
