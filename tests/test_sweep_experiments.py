"""Experiments as Ray tasks: each is done once its run has ended, and no lost process does it twice or not at all."""

import re
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest
from sweeping import TIMEOUT, TINY, assert_same_results, kill_outright, sweep, wait_for, worker_processes, written

from memlib.results import open_results

OPTIONS = ["--epochs", "2", "--set", "checkpoints.epochs=[0,1]", "--set", "rewinding.limit=50"]
OPTIONS += ["--set", "retraining.epochs=2", "--set", "retraining.limit=50", "--set", "retraining.on=['clean']"]
OPTIONS += ["--set", "critical_units.examples=4", "--set", "critical_units.part_size=4"]
OPTIONS += ["--set", "critical_units.reference_size=16", "--set", "cross_validation.folds=2"]
N_GROUPS, N_RUNS = 9, 2
N_UNITS = {"rewinding": N_GROUPS * 2 * N_RUNS, "retraining": N_GROUPS * N_RUNS, "critical_units": 2 * N_RUNS}
N_UNITS |= {"cross_validation": 2 * N_RUNS}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Two runs with both experiments that nothing happened to, and what the command printed."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    code, out, err = sweep(results, *OPTIONS)
    assert (code, err) == (0, ""), out + err
    return results, out


def test_every_unit_of_every_group_is_done_and_says_so(undisturbed):
    results, out = undisturbed
    store = open_results(results)
    assert {table: len(store.units(table)) for table in N_UNITS} == N_UNITS
    assert store.read("rewinding").num_rows == N_UNITS["rewinding"] * 3  # clean, noisy, test
    assert store.units("units") == set().union(*(store.units(table) for table in N_UNITS))
    assert set(store.read("units")["status"].to_pylist()) == {"done"}
    for experiment in N_UNITS:
        assert len(re.findall(rf"done: {experiment} of digits resnet9 noise 0.1 seed [01] \(\d+ units", out)) == N_RUNS
    assert re.search(r"  rewinding: 36 units in 18 tasks, at most [\d.e-]+ TFLOP", out)


def test_a_second_sweep_finds_every_unit_done(undisturbed, capsys):
    from sweeps.full_paper import main

    results, _ = undisturbed
    before = written(results, *N_UNITS)
    assert main([*TINY, "--results", str(results), *OPTIONS]) == 0
    assert "nothing to do: everything is already done" in capsys.readouterr().out
    assert written(results, *N_UNITS) == before


def test_asking_for_more_computes_only_what_is_new(undisturbed):
    results, _ = undisturbed
    before = written(results, *N_UNITS)
    code, out, _ = sweep(results, *OPTIONS, "--set", "rewinding.sets=['single','conv4+classifier']")
    assert code == 0
    assert "2 runs wanted, 2 done, 4 units of experiments to do on those, 0 to do" in out
    after = written(results, *N_UNITS)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 4
    for path in after.keys() - before.keys():  # as the other tests expect it
        path.unlink()
        Path(results, "units", path.name).unlink()


def test_no_process_killed_among_the_tasks_repeats_a_unit_or_loses_one(undisturbed, tmp_path, start):
    """The whole sweep outright, then a task's process of the sweep that continues it."""
    results = tmp_path / "results"
    driver = start(results, *OPTIONS)
    wait_for(lambda: len(written(results, "retraining")) >= 2, seconds=TIMEOUT)
    kill_outright(driver)
    done = written(results, *N_UNITS)
    driver = start(results, *OPTIONS)
    wait_for(lambda: worker_processes(driver, "ray::_perform"), seconds=TIMEOUT)
    worker_processes(driver, "ray::_perform")[0].kill()
    out, err = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, out + err
    assert len(re.findall(r"lost: .* of digits .* \(its process was lost\); trying again \(1 of 3\)", out)) == 1, out
    assert done.items() <= written(results, *N_UNITS).items()
    assert_same_results(results, undisturbed[0])


def test_a_damaged_checkpoint_fails_its_tasks_alone_and_deleting_it_mends_them(undisturbed, tmp_path):
    results = Path(shutil.copytree(undisturbed[0], tmp_path / "results"))
    for table in (*N_UNITS, "removed_units", "units"):
        shutil.rmtree(results / table)
    options = [*OPTIONS, "--seeds", "0"]
    (run,) = open_results(results).read("runs").filter(pc.field("seed") == 0).to_pylist()
    checkpoint = results / "checkpoints" / run["run_id"] / "epoch-0001.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-8])
    code, out, _ = sweep(results, *options)
    assert code == 1
    assert re.search(r"failed: rewinding conv1 of digits .* is damaged .*; delete it and run the sweep again", out)
    failed = open_results(results).read("units").filter(pc.field("status") == "failed").to_pylist()
    assert {row["experiment"] for row in failed} == {"rewinding", "critical_units"}  # retraining starts from epoch 0
    assert len(open_results(results).units("retraining")) == N_GROUPS
    checkpoint.unlink()
    code, out, err = sweep(results, *options)
    assert code == 0, out + err
    assert re.search(r"note: 1 finished runs lack a state or a table and are trained again; \d+ units of", out)
    assert set(open_results(results).read("units")["status"].to_pylist()) == {"done"}


RECALIBRATED = ("--set", "rewinding.batchnorm='recalibrated'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "rewinding.epochs=[0,7]"], "rewinding.epochs asks for epochs [7] but the run keeps its states at"),
        (["--set", "rewinding.epochs=[0,99]"], "rewinding.epochs asks for epoch 99, but run"),
        (["--set", "rewinding.sets=['conv44']"], "layer group 'conv44' is not known; did you mean 'conv4'"),
        (["--set", "rewinding.batchnorm='fresh'"], "value of rewinding.batchnorm 'fresh' is not known"),
        (["--models", "vit", "--set", "model.width=1", *RECALIBRATED], "'recalibrated' but vit has no BatchNorm"),
        (["--experiments", "rewind"], "experiment 'rewind' is not known; did you mean 'rewinding'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line_before_any_compute(options, message, tmp_path, capsys):
    from sweeps.full_paper import main

    assert main([*TINY, "--results", str(tmp_path / "results"), *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert "started" not in shown.out
