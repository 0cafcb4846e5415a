"""The search for critical units of a finished run: which examples, in which parts, and what is written of each."""

from dataclasses import replace

import pyarrow.compute as pc
import pytest
import torch

from memlib.checkpoints import CheckpointFolder
from memlib.critical_units import draw_reference, find_critical_units, take_examples
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.evaluation import predict
from memlib.experiments import CriticalUnitsConfig, ExperimentsConfig
from memlib.models import build_model
from memlib.results import create_results
from memlib.runs import perform_run, prepare_data
from memlib.tasks import perform_task, plan_tasks
from sweeps.costs import task_cost

CPU = torch.device("cpu")
CONFIG = CriticalUnitsConfig(
    examples=8, part_size=4, reference_size=16, copies=2, reference_copies=2, max_steps=3, limit=50, early_epoch=2
)


def plan(run, config=CONFIG):
    return plan_tasks(run, ExperimentsConfig(critical_units=config), ())


@pytest.fixture(scope="module")
def searched(tmp_path_factory, digits, small_run):
    store = create_results(tmp_path_factory.mktemp("searched"))
    perform_run(small_run, digits, store, device=CPU)
    for task in plan(small_run):
        perform_task(task, digits, store, device=CPU)
    return store


def table(store, name, *conditions):
    rows = store.read(name)
    for column, value in conditions:
        rows = rows.filter(pc.field(column) == value)
    return rows.to_pylist()


def test_examples_are_planned_in_parts_of_clean_and_of_noisy_ones(small_run):
    units = [unit for task in plan(small_run) for unit in task.units]
    assert [(u.settings["kind"], u.settings["part"]) for u in units] == [
        ("clean", 0),
        ("clean", 1),
        ("noisy", 0),
        ("noisy", 1),
    ]


def test_asking_for_more_examples_leaves_the_parts_there_were_unchanged(small_run):
    more = CriticalUnitsConfig(**{**vars(CONFIG), "examples": 16})
    few_ids, more_ids = ({u.unit_id for t in plan(small_run, config) for u in t.units} for config in (CONFIG, more))
    assert few_ids < more_ids
    with pytest.raises(InputError, match="examples is 10, which is no multiple of critical_units.part_size"):
        CriticalUnitsConfig(examples=10, part_size=4)


def test_every_example_is_distinct_of_its_kind_and_predicted_as_assigned(searched, digits, small_run):
    data = prepare_data(small_run, digits)
    noisy_ids = set(data.train.ids[data.noisy_labels.is_noisy].tolist())
    rows = table(searched, "critical_units")
    ids = [row["example_id"] for row in rows]
    assert len(set(ids)) == len(ids)
    assert all((row["example_id"] in noisy_ids) == row["is_noisy"] for row in rows)
    stored = {r["example_id"]: r for r in table(searched, "examples", ("split", "train"))}
    for row in rows:
        assert stored[row["example_id"]]["prediction"] == row["assigned"] == stored[row["example_id"]]["assigned"]


def test_the_rows_are_those_of_a_search_for_the_same_examples_in_one_call(searched, digits, small_run):
    data = prepare_data(small_run, digits)
    train = ImageSet(data.train.images, data.noisy_labels.labels, data.train.ids)
    model = build_model(small_run.model, image_shape=digits.image_shape, num_classes=10, seed=9)
    model.load_state_dict(CheckpointFolder(searched.storage, small_run.run_id).load_epoch(3).tensors)
    rows = {row["example_id"]: row for row in table(searched, "critical_units")}
    reference = draw_reference(train, torch.empty(0, dtype=torch.int64), CONFIG, seed=0)
    assert not set(rows) & set(reference.ids.tolist())
    found = find_critical_units(model, take_examples(train, list(rows)), reference, CONFIG, seed=0, device=CPU)
    assert {i for i, row in rows.items() if row["outcome"] == "skipped"} == set(found.skipped)
    for example in found.found:
        row = rows[example.example_id]
        assert (row["outcome"], row["n_removed"]) == (example.outcome, len(example.removed))
        removed = table(searched, "removed_units", ("example_id", example.example_id))
        assert [(r["step"], r["layer"], r["unit"]) for r in removed] == [
            (step, unit.layer, unit.unit) for step, unit in enumerate(example.removed, start=1)
        ]
        assert all(r["is_noisy"] == row["is_noisy"] and r["unit"] < r["n_units"] for r in removed)


def test_an_early_state_tells_learned_from_memorized_examples(searched, digits, small_run):
    data = prepare_data(small_run, digits)
    model = build_model(small_run.model, image_shape=digits.image_shape, num_classes=10, seed=9)
    model.load_state_dict(CheckpointFolder(searched.storage, small_run.run_id).load_epoch(2).tensors)
    right = (
        predict(model, data.train.images, data.noisy_labels.labels, device=CPU).prediction == data.noisy_labels.labels
    )
    early = dict(zip(data.train.ids.tolist(), right.tolist(), strict=True))
    rows = table(searched, "critical_units")
    assert all((row["right_early"], row["early_epoch"]) == (early[row["example_id"]], 2) for row in rows)


def test_edited_networks_are_judged_on_a_class_balanced_draw(searched):
    flipped = [row for row in table(searched, "critical_units") if row["outcome"] != "skipped"]
    assert {row["n_clean"] + row["n_noisy"] for row in flipped} == {50}
    assert all(0 <= row["clean_accuracy_after"] <= 1 and 0 <= row["noisy_accuracy_after"] <= 1 for row in flipped)
    assert len({(row["clean_accuracy_before"], row["noisy_accuracy_before"]) for row in flipped}) == 1


def test_a_part_beyond_the_last_example_is_done_and_empty(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    config = CriticalUnitsConfig(**{**vars(CONFIG), "examples": 400, "part_size": 200, "early_epoch": None})
    last = plan(small_run, config)[-1]
    perform_task(last, digits, store, device=CPU)
    assert store.units("critical_units") == {last.units[0].unit_id}
    assert store.read("critical_units").num_rows == 0


def test_the_early_state_is_the_newest_kept_one_up_to_the_epoch_asked_for_but_not_initialization(small_run):
    def early(epoch):  # kept: 0, 2 and the last, 3
        (settings, *_) = [u.settings for t in plan(small_run, CriticalUnitsConfig(early_epoch=epoch)) for u in t.units]
        return settings.get("early_epoch")

    assert [early(epoch) for epoch in (None, 0, 1, 2, 3, 9)] == [None, None, None, 2, 2, 2]


@pytest.mark.parametrize("part_size", [30, 3, 64])
def test_parts_of_any_size_are_searched_and_planned(part_size, digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    config = CriticalUnitsConfig(**{**vars(CONFIG), "examples": 2 * part_size, "part_size": part_size})
    tasks = plan(small_run, replace(config, early_epoch=None, max_steps=1))
    assert all(task_cost(task, digits).flops > 0 for task in tasks)
    perform_task(tasks[0], digits, store, device=CPU)
    assert 0 < store.read("critical_units").num_rows <= part_size


def test_a_limit_below_the_number_of_classes_is_refused_by_its_own_name(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    config = CriticalUnitsConfig(**{**vars(CONFIG), "limit": 5})
    with pytest.raises(InputError, match="critical_units.limit is 5, but there are 10 classes"):
        perform_task(plan(small_run, config)[0], digits, store, device=CPU)
