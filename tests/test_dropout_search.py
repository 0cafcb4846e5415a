"""The search on real Ray: what it leaves, and that no interruption repeats or changes a trial."""

import contextlib
from pathlib import Path

import pytest
import torch
from sweeping import TIMEOUT, finished_epochs, kill_outright, sweep, wait_for

from memlib.checkpoints import CheckpointFolder
from memlib.config import config_from_json
from memlib.datasets import load_dataset
from memlib.model_selection import best_setting
from memlib.results import create_results, open_results
from memlib.storage import open_storage
from memlib.trials import TABLE, perform_trial, trial_unit
from sweeps.dropout_search import main

SCRIPT = {"script": "dropout_search.py"}
OPTIONS = ["--dataset", "digits", "--limit", "200", "--noise", "0.2", "--holdout", "0.25", "--epochs", "8"]
OPTIONS += ["--width", "0.0625", "--p-gen", "0.25", "0.5", "--p-mem", "0.1", "0.3"]
OPTIONS += ["--grace", "2", "--reduction", "2", "--set", "training.precision=float32"]
N_TRIALS = 4
KILLED_AT = 3  # epochs of some trial


@contextlib.contextmanager
def one_thread():
    """A trial's share of the machine: with other shares sums are added up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def written(results):
    return {path: path.stat().st_mtime_ns for path in Path(results, TABLE).glob("*.parquet")}


def test_a_search_killed_outright_continues_ends_with_the_same_trials_and_is_then_done(tmp_path, start, capsys):
    results = tmp_path / "results"
    driver = start(results, *OPTIONS, **SCRIPT)
    wait_for(lambda: max(finished_epochs(results), default=0) >= KILLED_AT, TIMEOUT)
    kill_outright(driver)
    before = written(results)

    code, out, err = sweep(results, *OPTIONS, **SCRIPT)
    assert (code, err) == (0, ""), out + err
    assert f"{N_TRIALS} trials and 1 controls without dropout wanted" in out
    after = written(results)
    assert all(after[path] == when for path, when in before.items())
    assert len(after) == N_TRIALS + 1
    rows = open_results(results).read(TABLE).to_pylist()
    final = [row for row in rows if row["batchnorm"] == "final"]
    assert len(final) == N_TRIALS + 1
    assert {row["dropout"] for row in final if row["epochs"] == 8} == {"none", "example_tied"}
    assert all(row["stopped_early"] == (row["epochs"] in (2, 4)) for row in final)  # the rungs before the end
    assert out.count("stopped after ") >= sum(row["stopped_early"] for row in final) - len(before)
    with one_thread():
        _assert_undisturbed(final, tmp_path)
    _assert_nothing_left(results, final)
    (best,) = best_setting(rows)
    assert f"best by validation: p_gen {best['p_gen']:g}, p_mem {best['p_mem']:g}" in out

    assert main(["--results", str(results), *OPTIONS]) == 0
    assert f"{N_TRIALS + 1} done, 0 to do" in capsys.readouterr().out
    assert written(results) == after


def _assert_undisturbed(final, tmp_path):
    """Every curve is the beginning of what the trial gives on its own, without Ray, and nothing happening to it."""
    images = load_dataset("digits", image_size=16)
    store = create_results(tmp_path / "alone")
    for row in final:
        run = config_from_json(row["config"])
        curve = []
        perform_trial(
            run,
            images,
            store,
            device=torch.device("cpu"),
            on_epoch=lambda record, curve=curve: curve.append(record.accuracies["validation"].accuracy),
        )
        assert row["validation_curve"] == pytest.approx(curve[: row["epochs"] + 1])
    whole = {r["unit_id"]: r for r in store.read(TABLE).to_pylist() if r["batchnorm"] == "final"}
    for row in final:
        if not row["stopped_early"]:
            assert row["test_accuracy"] == pytest.approx(whole[row["unit_id"]]["test_accuracy"])


def _assert_nothing_left(results, final):
    """Only trials trained to the end keep a state, and none keeps what it could continue from."""
    for row in final:
        unit = trial_unit(config_from_json(row["config"])).unit_id
        assert unit == row["unit_id"]
        folder = CheckpointFolder(open_storage(results), unit)
        assert folder.load_last() is None
        assert folder.epochs() == (() if row["stopped_early"] else (8,))


@pytest.mark.slow  # a Ray of its own; that a run's own error is final and recorded is tested of full_paper.py
def test_a_trial_that_diverges_fails_alone_and_is_named(tmp_path):
    code, out, _ = sweep(tmp_path, *OPTIONS, "--peak-lr", "1e30", "--samples", "1", **SCRIPT)
    assert code == 1
    assert "failed: p_gen" in out
    assert "lower training.peak_lr (now 1e+30)" in out
    units = open_results(tmp_path).read("units").to_pylist()
    assert {(unit["experiment"], unit["status"]) for unit in units} == {(TABLE, "failed")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "digit"], "data set 'digit' is not known; did you mean 'digits'"),
        (["--dataset", "digits", "--p-gen", "1.5"], "dropout.p_gen is 1.5"),
        (["--dataset", "digits", "--grace", "99"], "--grace is 99 but trials have 36 epochs"),
        (["--dataset", "digits", "--after", "conv9"], "conv9"),
        (["--dataset", "digits", "--width", "0.0625", "--p-gen", "0.05"], "too few for a generalization neuron"),
        (["--dataset", "digits", "--set", "dropout.p_mem=0.3"], "use --p-mem"),
        (["--dataset", "digits", "--limit", "50"], "training.batch_size is 64 but digits has 45"),
    ],
)
def test_bad_input_is_one_line_before_any_compute(options, message, tmp_path, capsys):
    assert main([*options, "--results", str(tmp_path / "results")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not (tmp_path / "results" / TABLE).exists()
