"""A network is measured only if it computes what it did when its state was kept."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from memlib.checkpoints import CheckpointFolder, load_model_state
from memlib.config import DropoutConfig, ModelConfig
from memlib.errors import InputError
from memlib.example_tied_dropout import set_mode
from memlib.experiments import CrossValidationConfig, ExperimentsConfig, RewindingConfig
from memlib.models import build_model
from memlib.probes import check_probe, probe_facts
from memlib.results import create_results
from memlib.runs import build_network, perform_run, prepare_data
from memlib.tasks import perform_task, plan_tasks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(small_run, digits, tmp_path_factory):
    store = create_results(tmp_path_factory.mktemp("trained"))
    perform_run(small_run, digits, store, device=CPU)
    return small_run, store


def rewinding(run):
    (task,) = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig(epochs=(0,), limit=5)), ("conv2",))
    return task


def test_a_kept_state_tells_the_logits_of_the_first_training_images(trained, digits):
    run, store = trained
    kept = CheckpointFolder(store.storage, run.run_id).load_epoch(run.training.epochs)
    model = build_network(run, digits)
    load_model_state(model, kept.tensors, where="")
    with torch.no_grad():
        expected = model.eval()((prepare_data(run, digits).train.images[:8] / 255 - 0.5) / 0.5)
    torch.testing.assert_close(torch.tensor(kept.facts["probe"]), expected, rtol=1e-4, atol=1e-4)


def with_other_epsilon(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    return model


def with_other_inputs(model):
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].abs(),))
    return model


@pytest.mark.parametrize("edit", [with_other_epsilon, with_other_inputs])
def test_a_network_of_other_code_under_the_same_names_is_not_measured(trained, digits, monkeypatch, edit):
    run, store = trained
    task = rewinding(run)
    monkeypatch.setattr("memlib.tasks.build_network", lambda *run_and_data: edit(build_network(*run_and_data)))
    with pytest.raises(InputError, match=f"network of run {run.run_id} .* no longer computes .* train it anew"):
        perform_task(task, digits, store, device=CPU)
    assert store.units("rewinding") == store.units("units") == set()


def test_cross_validation_trains_networks_of_its_own_and_asks_for_no_agreement(trained, digits, monkeypatch, tmp_path):
    run, store = trained
    wanted = ExperimentsConfig(cross_validation=CrossValidationConfig(folds=2, epochs=1))
    monkeypatch.setattr("memlib.tasks.build_network", lambda *given: with_other_epsilon(build_network(*given)))
    load = CheckpointFolder(store.storage, run.run_id).load_epoch
    into = create_results(tmp_path)
    perform_task(plan_tasks(run, wanted, ())[0], digits, into, device=CPU, load_checkpoint=load)
    assert len(into.units("cross_validation")) == 1


def test_a_training_is_not_continued_by_other_code(small_run, digits, tmp_path, monkeypatch):
    store = create_results(tmp_path)

    def interrupt(record):
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform_run(small_run, digits, store, device=CPU, on_epoch=interrupt)
    monkeypatch.setattr("memlib.runs.build_network", lambda *given: with_other_epsilon(build_network(*given)))
    with pytest.raises(InputError, match=f"network of run {small_run.run_id} no longer computes"):
        perform_run(small_run, digits, store, device=CPU)
    monkeypatch.undo()
    perform_run(small_run, digits, store, device=CPU)
    assert store.finished_runs() == {small_run.run_id}


def test_the_same_network_is_measured_on_any_number_of_threads(trained, digits, tmp_path):
    run, store = trained
    load = CheckpointFolder(store.storage, run.run_id).load_epoch
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            perform_task(rewinding(run), digits, create_results(tmp_path), device=CPU, load_checkpoint=load)
    finally:
        torch.set_num_threads(threads)


def test_a_state_kept_without_a_probe_is_taken_as_it_is(trained, digits):
    run, _ = trained
    model = build_network(run, digits)
    facts = probe_facts(model, digits.train)
    other = with_other_epsilon(model)
    with pytest.raises(InputError):
        check_probe(other, digits.train, facts, where="here")
    check_probe(other, digits.train, {}, where="here")


@pytest.mark.parametrize(
    ("model", "dropout"),
    [
        (ModelConfig(name="resnet9", width=0.25), DropoutConfig(kind="example_tied", p_gen=0.25, p_mem=0.3)),
        (ModelConfig(name="vit"), DropoutConfig()),
    ],
)
def test_a_probe_leaves_the_network_in_the_mode_it_was_in_and_draws_nothing(
    small_run, digits, shallow_vit, model, dropout
):
    network = build_network(replace(small_run, model=model, dropout=dropout), digits).train()
    if dropout.kind != "none":
        set_mode(network, "tied")
    before, state = {n: t.clone() for n, t in network.state_dict().items()}, torch.get_rng_state()
    facts = probe_facts(network, digits.train)
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    check_probe(network, digits.train, facts, where="here")
    assert torch.tensor(facts["probe"]).shape == (8, 10)


def test_numbers_that_are_no_numbers_agree_with_nothing(digits):
    model = build_model(ModelConfig(width=0.0625), image_shape=(1, 16, 16), num_classes=10, seed=0)
    facts = probe_facts(model, digits.train)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(InputError, match="differ by nan"):
        check_probe(model, digits.train, facts, where="here")
