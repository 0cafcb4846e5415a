"""On a GPU everything that is computed together lies together, and the same comes out: shown on a pretended one."""

from dataclasses import replace

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from pretended_gpu import OnGPU, pretended_gpu

import memlib
from memlib.config import CheckpointConfig, DropoutConfig, ModelConfig
from memlib.datasets import Dataset
from memlib.experiments import (
    CriticalUnitsConfig,
    CrossValidationConfig,
    ExperimentsConfig,
    RetrainingConfig,
    RewindingConfig,
)
from memlib.grouping import layer_groups
from memlib.results import create_results
from memlib.runs import build_network, perform_run, place_data, prepare_data
from memlib.schemas import SCHEMAS
from memlib.tasks import perform_task, plan_tasks
from memlib.trials import perform_trial

CPU = torch.device("cpu")
TIED = DropoutConfig(kind="example_tied", p_gen=0.3, p_mem=0.1)
EXPERIMENTS = ExperimentsConfig(
    rewinding=RewindingConfig(batchnorm="rewound", limit=10),
    retraining=RetrainingConfig(epochs=2, limit=10),
    critical_units=CriticalUnitsConfig(examples=2, part_size=2, max_steps=3, reference_size=16),
    cross_validation=CrossValidationConfig(folds=2, epochs=1),
)
WRITTEN = {"epochs", "gradients", "examples", "dynamics"}
BY_EXPERIMENTS = {"rewinding", "retraining", "critical_units", "removed_units", "cross_validation"}


@pytest.mark.parametrize(
    "misuse",
    [
        lambda there, here: there + here,
        lambda there, here: F.cross_entropy(there, torch.zeros(3, dtype=torch.int64)),
        lambda there, here: here[there.argmax(1)],
        lambda there, here: there.numpy(),
        lambda there, here: torch.cat([there, here]),
    ],
)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(misuse):
    with pretended_gpu() as gpu:
        here = torch.eye(3)
        there = here.to(gpu)
        assert isinstance(there, OnGPU)
        assert there.cpu().equal(here)
        assert here.to("cuda:0").device == torch.zeros(2, device="cuda:0").device == gpu
        with pytest.raises((RuntimeError, TypeError)):
            misuse(there, here)


def everything(store):
    """Return all rows of a store but times and devices, by table."""
    found = {}
    for name in SCHEMAS.keys() - {"runs", "units"}:
        rows = store.read(name)
        found[name] = rows.sort_by([(f.name, "ascending") for f in rows.schema if not pa.types.is_nested(f.type)])
    return {name: rows for name, rows in found.items() if rows.num_rows}


def perform_all(run, experiments, dataset, folder, device):
    """Train a run, perform the experiments on it, and return everything it wrote."""
    store = create_results(folder)
    perform_run(run, dataset, store, device=device)
    for task in plan_tasks(run, experiments, layer_groups(build_network(run, dataset)).names[-2:]):
        perform_task(task, dataset, store, device=device)
    return everything(store)


@pytest.mark.parametrize(
    ("changes", "experiments"),
    [
        ({}, EXPERIMENTS),
        ({"dropout": TIED}, EXPERIMENTS),
        ({"dropout": DropoutConfig(kind="channel", p_drop=0.2)}, ExperimentsConfig()),
        ({"model": ModelConfig(name="vit")}, ExperimentsConfig()),
        ({"model": ModelConfig(name="timm:resnet18")}, ExperimentsConfig()),
    ],
    ids=["none", "example_tied", "channel", "vit", "timm"],
)
@pytest.mark.usefixtures("shallow_vit")
def test_a_run_and_its_experiments_write_the_same_tables_as_on_a_cpu(small_run, digits, tmp_path, changes, experiments):
    some = digits.train.take(torch.arange(40)), digits.test.take(torch.arange(10))
    few = Dataset("digits", *some, digits.class_names)
    training = replace(small_run.training, epochs=1, batch_size=16, augment=("crop",))
    run = replace(small_run, training=training, checkpoints=CheckpointConfig(epochs=(0,)), **changes)
    expected = perform_all(run, experiments, few, tmp_path / "cpu", CPU)
    assert expected.keys() >= WRITTEN | (BY_EXPERIMENTS if experiments is EXPERIMENTS else set())
    with pretended_gpu() as gpu:
        assert perform_all(run, experiments, few, tmp_path / "gpu", gpu) == expected


def test_images_that_do_not_fit_into_the_gpu_stay_outside_and_change_nothing(small_run, digits, tmp_path):
    expected = perform_all(small_run, ExperimentsConfig(), digits, tmp_path / "cpu", CPU)
    assert expected.keys() == WRITTEN
    with pretended_gpu(free=10_000) as gpu:
        data = place_data(prepare_data(small_run, digits), digits.digest, gpu)
        assert not isinstance(data.train.images, OnGPU)
        assert perform_all(small_run, ExperimentsConfig(), digits, tmp_path / "gpu", gpu) == expected


def test_a_trial_of_the_search_writes_the_same_row(small_run, digits, tmp_path):
    run = replace(small_run, dropout=TIED, data=replace(small_run.data, holdout=0.2))
    stores = [create_results(tmp_path / name) for name in ("cpu", "gpu")]
    perform_trial(run, digits, stores[0], device=CPU)
    with pretended_gpu() as gpu:
        perform_trial(run, digits, stores[1], device=gpu)
    assert everything(stores[1]) == everything(stores[0])
    assert everything(stores[0]).keys() == {"dropout_search"}


def test_a_network_of_ones_own_is_tied_trained_and_pruned_where_it_lies(digits):
    def train_and_prune(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3),
            torch.nn.BatchNorm2d(16),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(3136, 10),
        )
        model = memlib.tie(model, after=["2"], p_gen=0.5, p_mem=0.2, seed=0).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        images, labels = digits.train.images[:32].to(device) / 255, digits.train.labels[:32].to(device)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(images, ids=digits.train.ids[:32].to(device)), labels).backward()
            optimizer.step()
        pruned = memlib.prune(model).eval()
        assert {p.device.type for p in pruned.parameters()} == {device.type}
        return pruned(images).detach().cpu()

    expected = train_and_prune(CPU)
    with pretended_gpu() as gpu:
        assert train_and_prune(gpu).equal(expected)
