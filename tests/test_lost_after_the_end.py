"""A run or trial whose process is lost after its last line was written is not computed again."""

from dataclasses import replace

import pytest
import torch

from memlib.config import config_from_json, config_to_json
from memlib.results import create_results
from memlib.runs import perform_run
from memlib.trials import perform_trial
from sweeps import search_trials, training_runs

CPU = torch.device("cpu")


@pytest.fixture
def here(monkeypatch):
    """Trials of Tune are worked on in this process, and have no images."""

    def work_here(trial, work, record_error):
        work(config_from_json(trial["config"]), CPU)

    for module in (training_runs, search_trials):
        monkeypatch.setattr(module, "work_in_trial", work_here)


def test_a_finished_run_is_left_alone_and_one_that_lacks_a_state_is_not(here, digits, small_run, tmp_path):
    store = create_results(tmp_path)
    perform_run(small_run, digits, store, device=CPU)
    trial = {"config": config_to_json(small_run)}
    again = {"datasets": {}, "results": str(tmp_path), "tensorboard": False}
    training_runs._train_trial(trial, **again)
    store.storage.delete(f"checkpoints/{small_run.run_id}/epoch-0000.safetensors")
    with pytest.raises(KeyError):  # it asks for its images
        training_runs._train_trial(trial, **again)


def test_a_finished_trial_is_left_alone_and_a_new_one_is_not(here, digits, small_run, tmp_path):
    run = replace(small_run, data=replace(small_run.data, holdout=0.2))
    perform_trial(run, digits, create_results(tmp_path), device=CPU)
    again = {"datasets": {}, "results": str(tmp_path)}
    search_trials._search_trial({"config": config_to_json(run)}, **again)
    with pytest.raises(KeyError):
        search_trials._search_trial({"config": config_to_json(replace(run, seed=1))}, **again)
