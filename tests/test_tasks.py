"""Experiments on a finished run as units of work: what is planned, what is missing, what is written."""

from dataclasses import replace

import pyarrow.compute as pc
import pytest
import torch

from memlib.batches import images_as_trained
from memlib.checkpoints import CheckpointFolder
from memlib.config import CheckpointConfig, NoiseConfig
from memlib.errors import InputError
from memlib.experiments import ExperimentsConfig, RetrainingConfig, RewindingConfig
from memlib.grouping import layer_groups
from memlib.layer_units import group_sets, splits_of
from memlib.models import build_model
from memlib.results import create_results
from memlib.rewinding import Measurement, rewind, rewinding_accuracies
from memlib.runs import perform_run, prepare_data
from memlib.tasks import perform_task, plan_tasks, record_unit_failure
from memlib.units import missing_tasks

CPU = torch.device("cpu")
GROUPS = ("conv1", "conv2", "classifier")


def units(tasks):
    return [unit for task in tasks for unit in task.units]


def test_a_task_is_one_group_and_its_units_are_the_epochs(small_run):
    run = replace(small_run, checkpoints=CheckpointConfig(epochs=(0, 1, 2)))
    tasks = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig()), GROUPS)
    assert [[u.settings["groups"] for u in task.units] for task in tasks] == [[[g]] * 3 for g in GROUPS]
    assert [u.settings["rewind_epoch"] for u in tasks[0].units] == [0, 1, 2]  # every kept epoch but the last


def test_retraining_is_one_task_a_group_and_kind_of_examples(small_run):
    config = RetrainingConfig(on=("clean", "noisy"))
    tasks = plan_tasks(small_run, ExperimentsConfig(retraining=config), GROUPS)
    expected = [(group, kind) for group in GROUPS for kind in ("clean", "noisy")]
    assert [(u.settings["group"], u.settings["trained_on"]) for u in units(tasks)] == expected
    without_noise = replace(small_run, noise=NoiseConfig(fraction=0.0))
    tasks = plan_tasks(without_noise, ExperimentsConfig(retraining=config), GROUPS)
    assert {u.settings["trained_on"] for u in units(tasks)} == {"clean"}


def test_what_is_not_wanted_is_not_planned(small_run):
    assert plan_tasks(small_run, ExperimentsConfig(), GROUPS) == []


def test_sets_of_groups_are_named_from_either_end_or_one_by_one():
    names = ["a", "b", "c"]
    assert group_sets(["single"], names) == [["a"], ["b"], ["c"]]
    assert group_sets(["prefixes"], names) == [["a", "b"], ["a", "b", "c"]]
    assert group_sets(["suffixes", "prefixes"], names) == [["b", "c"], ["a", "b", "c"], ["a", "b"]]
    assert group_sets(["c+a"], names) == [["a", "c"]]
    with pytest.raises(InputError, match="layer group 'd' is not known"):
        group_sets(["a+d"], names)


def test_more_epochs_leave_the_units_there_were_unchanged(small_run):
    run = replace(small_run, checkpoints=CheckpointConfig(epochs=(0, 1, 2)))
    few = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig(epochs=(0,))), GROUPS)
    many = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig(epochs=(0, 2))), GROUPS)
    done = {"rewinding": {u.unit_id for u in units(few)}, "retraining": set()}
    assert [u.settings["rewind_epoch"] for u in units(missing_tasks(many, done))] == [2] * len(GROUPS)
    assert missing_tasks(few, done) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (RewindingConfig(), RewindingConfig(limit=100)),
        (RewindingConfig(), RewindingConfig(batchnorm="rewound")),
        (RetrainingConfig(), RetrainingConfig(epochs=5)),
        (RetrainingConfig(), RetrainingConfig(on=("noisy",))),
    ],
)
def test_whatever_can_move_a_number_makes_other_units(small_run, one, other):
    def ids(config):
        name = "rewinding" if isinstance(config, RewindingConfig) else "retraining"
        return {u.unit_id for u in units(plan_tasks(small_run, ExperimentsConfig(**{name: config}), GROUPS))}

    assert ids(one) == ids(one)
    assert not ids(one) & ids(other)


def test_an_epoch_that_was_not_kept_is_named_with_those_that_were(small_run):
    wanted = ExperimentsConfig(rewinding=RewindingConfig(epochs=(0, 1)))
    with pytest.raises(InputError, match=r"asks for epochs \[1\] but the run keeps its states at \[0, 2, 3\] only"):
        plan_tasks(small_run, wanted, GROUPS)
    with pytest.raises(InputError, match=r"retraining.reset_epoch asks for epochs \[1\]"):
        plan_tasks(small_run, ExperimentsConfig(retraining=RetrainingConfig(reset_epoch=1)), GROUPS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, small_run):
    store = create_results(tmp_path_factory.mktemp("trained"))
    perform_run(small_run, digits, store, device=CPU)
    return small_run, store


def test_rewinding_rows_are_the_accuracies_of_the_runs_own_checkpoints(trained, digits):
    run, store = trained
    names = ("conv1", "conv3", "classifier")
    tasks = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig(sets=("single", "conv3+classifier"))), names)
    for task in tasks:
        perform_task(task, digits, store, device=CPU)
    rows = store.read("rewinding").to_pylist()
    assert len(rows) == 4 * 2 * 3
    checkpoints = CheckpointFolder(store.storage, run.run_id)
    model = build_model(run.model, image_shape=digits.image_shape, num_classes=10, seed=9)
    model.load_state_dict(checkpoints.load_epoch(3).tensors)
    splits = splits_of(prepare_data(run, digits), limit=None, seed=run.seed)
    assert {name: len(labels) for name, (_, labels) in splits.items()} == {"clean": 160, "noisy": 40, "test": 60}
    for row in rows:
        rewound = rewind(model, checkpoints.load_epoch(row["rewind_epoch"]).tensors, row["group"].split("+"))
        (expected,) = rewinding_accuracies(
            rewound, {0: rewound.state_dict()}, {"x": splits[row["split"]]}, sets=[("conv1",)]
        )
        assert abs(row["accuracy"] - expected.accuracy) <= 1 / row["n"]  # a tie broken by rounding at most
        assert (row["n"], row["batchnorm"]) == (expected.n, "final")
    pair = next(row for row in rows if row["group"] == "conv3+classifier")
    assert (pair["n_groups"], pair["group_index"]) == (2, layer_groups(model).names.index("conv3"))
    assert {u.unit_id for u in units(tasks)} == store.units("rewinding")
    done = store.read("units").filter(pc.field("experiment") == "rewinding").to_pylist()
    assert {row["status"] for row in done} == {"done"}
    assert all(row["seconds"] > 0 and row["code_version"] and row["device"].startswith("cpu") for row in done)


def test_a_run_that_augments_is_rewound_with_statistics_of_augmented_images(digits, small_run, tmp_path):
    run = replace(small_run, training=replace(small_run.training, augment=("crop",), epochs=1))
    store = create_results(tmp_path)
    perform_run(run, digits, store, device=CPU)
    config = ExperimentsConfig(rewinding=RewindingConfig(batchnorm="recalibrated"))
    for task in plan_tasks(run, config, ("conv3",)):
        perform_task(task, digits, store, device=CPU)
    checkpoints, data = CheckpointFolder(store.storage, run.run_id), prepare_data(run, digits)
    model = build_model(run.model, image_shape=digits.image_shape, num_classes=10, seed=9)
    model.load_state_dict(checkpoints.load_epoch(1).tensors)
    cropped = images_as_trained(data.train.images, run.training, seed=run.seed)
    assert not torch.equal(cropped, data.train.images)
    expected = rewinding_accuracies(
        model,
        {0: checkpoints.load_epoch(0).tensors},
        splits_of(data, limit=None, seed=run.seed),
        sets=[("conv3",)],
        measurement=Measurement(batchnorm="recalibrated", calibration=cropped),
    )
    rows = store.read("rewinding").to_pylist()
    assert {r["split"]: r["accuracy"] for r in rows} == pytest.approx({e.split: e.accuracy for e in expected})


def test_retraining_rows_are_a_curve_from_before_the_first_epoch(trained, digits):
    run, store = trained
    config = RetrainingConfig(epochs=2, batch_size=32, on=("clean", "noisy"), limit=30)
    for task in plan_tasks(run, ExperimentsConfig(retraining=config), ("conv3",)):
        perform_task(task, digits, store, device=CPU)
    rows = store.read("retraining").to_pylist()
    curves = {(r["trained_on"], r["split"], r["epoch"]): r["accuracy"] for r in rows}
    assert len(curves) == len(rows) == 2 * 3 * 3
    assert {r["n"] for r in rows} == {30}
    assert all(curves["clean", split, 0] == curves["noisy", split, 0] for split in ("clean", "noisy", "test"))
    assert curves["noisy", "noisy", 2] >= curves["clean", "noisy", 2]


def test_an_evaluated_subset_is_a_function_of_the_seed_and_of_the_limit(trained, digits):
    run, _ = trained
    data = prepare_data(run, digits)
    some, again, others = (splits_of(data, limit=20, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(some[name][0], again[name][0]) for name in some)
    assert any(not torch.equal(some[name][0], others[name][0]) for name in some)
    assert {len(labels) for _, labels in some.values()} == {20}
    clean = splits_of(prepare_data(replace(run, noise=NoiseConfig(fraction=0.0)), digits), limit=None, seed=0)
    assert set(clean) == {"clean", "test"}


def test_a_failure_leaves_the_units_alone_that_were_done_before_it(trained, digits):
    run, store = trained
    plan = ExperimentsConfig(rewinding=RewindingConfig(epochs=(0, 2), limit=7))
    (task,) = plan_tasks(run, plan, ("conv2",))
    perform_task(replace(task, units=task.units[:1]), digits, store, device=CPU)
    record_unit_failure(task, store, device=None, error="the node went away")
    status = {row["unit_id"]: row["status"] for row in store.read("units").to_pylist()}
    assert [status[unit.unit_id] for unit in task.units] == ["done", "failed"]


def test_a_failure_is_a_row_that_a_later_success_replaces(trained, digits):
    run, store = trained
    (task,) = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig(epochs=(2,), limit=5)), ("conv2",))
    record_unit_failure(task, store, device=None, error="the node went away")
    row = store.read("units").filter(pc.field("unit_id") == task.units[0].unit_id).to_pylist()[0]
    assert (row["status"], row["error"]) == ("failed", "the node went away")
    assert missing_tasks([task], {"rewinding": store.units("rewinding")}) == [task]
    perform_task(task, digits, store, device=CPU)
    (row,) = store.read("units").filter(pc.field("unit_id") == task.units[0].unit_id).to_pylist()
    assert (row["status"], row["error"]) == ("done", None)
    assert missing_tasks([task], {"rewinding": store.units("rewinding")}) == []


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_wherever_a_task_is_killed_the_units_that_are_done_have_their_rows(
    trained, digits, tmp_path, kill_after_writes, written
):
    run, store = trained
    tasks = plan_tasks(run, ExperimentsConfig(rewinding=RewindingConfig(epochs=(0, 2), limit=5)), ("conv2",))
    load_checkpoint = CheckpointFolder(store.storage, run.run_id).load_epoch
    store = create_results(tmp_path)
    kill_after_writes(written)
    with pytest.raises(KeyboardInterrupt):
        perform_task(tasks[0], digits, store, device=CPU, load_checkpoint=load_checkpoint)
    assert len(store.units("rewinding")) == written // 2
    assert store.units("rewinding") <= store.units("units")
