"""What a sweep still has to do, told from the store."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from memlib.config import DropoutConfig, NoiseConfig
from memlib.cross_validation import plan_cross_validation
from memlib.datasets import load_dataset
from memlib.errors import InputError
from memlib.experiments import (
    CriticalUnitsConfig,
    CrossValidationConfig,
    ExperimentsConfig,
    RetrainingConfig,
    RewindingConfig,
)
from memlib.grouping import layer_groups
from memlib.models import build_model
from memlib.results import create_results
from memlib.runs import perform_run
from memlib.schemas import SCHEMAS
from sweeps.costs import run_cost, task_cost
from sweeps.full_paper import main
from sweeps.plan import load_preset, plan_runs, with_axes
from sweeps.preflight import check_runs, dataset_key
from sweeps.preflight import load_datasets as load
from sweeps.wanted import ToDo, done_by_experiment, still_to_do


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


@pytest.mark.parametrize(
    "table", ["epochs", "gradients", "dynamics", "examples", "runs", "dropout", "forgotten_images"]
)
def test_a_run_whose_file_was_deleted_is_wanted_again(table, digits, small_run, tmp_path):
    store = create_results(tmp_path)
    run = replace(
        small_run,
        dropout=DropoutConfig(kind="example_tied", p_gen=0.5, p_mem=0.5),
        training=replace(small_run.training, epochs=1),
    )
    perform_run(run, digits, store, device=torch.device("cpu"))
    assert still_to_do({run: ExperimentsConfig()}, store).runs == []
    store.compact()
    (path,) = (tmp_path / table).iterdir()
    path.unlink()
    assert still_to_do({run: ExperimentsConfig()}, store).runs == [run]


def test_a_unit_is_done_when_all_its_tables_are_there(tmp_path):
    store = create_results(tmp_path)
    store.write("critical_units", "u", SCHEMAS["critical_units"].empty_table().drop_columns(["unit_id"]))
    assert done_by_experiment(store)["critical_units"] == set()
    store.write("removed_units", "u", SCHEMAS["removed_units"].empty_table().drop_columns(["unit_id"]))
    assert done_by_experiment(store)["critical_units"] == {"u"}


def write_images(folder, *, shade):
    """A folder data set of 5 x 8 squares of 12 x 12, brighter by `shade`."""
    for label in range(5):
        place = folder / "train" / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        for i in range(8):
            Image.new("L", (12, 12), 40 * label + i + shade).save(place / f"{i}.png")


def test_experiments_on_a_finished_run_are_refused_on_other_images(tmp_path, capsys):
    name, overrides = f"folder:{tmp_path / 'images'}", {"epochs": 1, "batch_size": 8, "precision": "float32"}
    write_images(tmp_path / "images", shade=0)
    axes = {"datasets": [name], "dropouts": ["none"], "seeds": [0]}
    (run,) = plan_runs(
        with_axes(load_preset("quick"), axes), {"training": overrides, "model": {"width": 0.0625}}, experiments=[]
    )
    results = tmp_path / "results"
    perform_run(run, load_dataset(name), create_results(results), device=torch.device("cpu"))
    command = [
        "--preset",
        "quick",
        "--datasets",
        name,
        "--dropouts",
        "none",
        "--seeds",
        "0",
        "--set",
        "model.width=0.0625",
    ]
    for key, value in overrides.items():
        command += ["--set", f"training.{key}={value}"]
    command += ["--results", str(results)]
    assert main([*command, "--experiments"]) == 0
    assert "1 runs wanted, 1 done" in capsys.readouterr().out
    write_images(tmp_path / "images", shade=1)
    assert main([*command, "--experiments", "rewinding"]) == 2
    printed = capsys.readouterr()
    assert "holds runs on other images that were also called folder:" in printed.out + printed.err


def test_a_finished_run_that_lacks_a_state_is_told_apart_from_a_new_one(digits, small_run, tmp_path):
    store, run = create_results(tmp_path), replace(small_run, training=replace(small_run.training, epochs=1))
    perform_run(run, digits, store, device=torch.device("cpu"))
    new = replace(run, seed=1)
    assert still_to_do({run: ExperimentsConfig(), new: ExperimentsConfig()}, store) == ToDo([new], [], ())
    store.storage.delete(f"checkpoints/{run.run_id}/epoch-0000.safetensors")
    assert still_to_do({run: ExperimentsConfig(), new: ExperimentsConfig()}, store) == ToDo([run, new], [], (run,))


@pytest.mark.parametrize(
    ("experiments", "message"),
    [
        (
            ExperimentsConfig(critical_units=CriticalUnitsConfig(reference_size=201)),
            "critical_units.reference_size is 201, but the run trains on 200 examples; lower it",
        ),
        (
            ExperimentsConfig(critical_units=CriticalUnitsConfig(reference_size=9, limit=5)),
            "critical_units.limit is 5, but there are 10 classes",
        ),
        (
            ExperimentsConfig(cross_validation=CrossValidationConfig(folds=201)),
            "cross_validation.folds is 201 for 200 examples",
        ),
        (
            ExperimentsConfig(retraining=RetrainingConfig(on=("clean", "noisy"))),
            "retraining.on asks for noisy examples, but of 200 labels none is wrong",
        ),
    ],
)
def test_what_a_training_set_cannot_give_is_named_before_anything_is_trained(digits, small_run, experiments, message):
    run = replace(small_run, noise=NoiseConfig(fraction=0.004))  # of 200: none
    with pytest.raises(InputError, match=message):
        check_runs({run: experiments}, {dataset_key(run): digits})
    names = check_runs({run: ExperimentsConfig(rewinding=RewindingConfig())}, {dataset_key(run): digits})
    assert names[run][0] == "conv1"
