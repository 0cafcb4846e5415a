"""What a plan says it costs: the time of its FLOPs at throughputs measured with the runs' own steps."""

import json
from dataclasses import replace

import pytest
import torch

from memlib.config import DropoutConfig
from sweeps.costs import run_cost
from sweeps.estimates import EPOCH_SECONDS, TASK_SECONDS, WORKER_SECONDS, RunCost, Work, seconds_of, sweep_seconds
from sweeps.throughput import Throughput, measure_throughput, measured_elsewhere

CPU = torch.device("cpu")
RATES = Throughput(training=100.0, evaluation=50.0)


def seconds(run, runs=0, tasks=(), lanes=1):
    """The estimate for `runs` equal runs of 1,000 FLOPs, half of them training, and tasks of so many FLOPs."""
    all_runs = [replace(run, seed=seed) for seed in range(max(runs, 1))]
    cost = RunCost(1000.0, 0, training_flops=500.0)
    work = Work(dict.fromkeys(all_runs[:runs], cost), [(run, RunCost(float(flops), 0)) for flops in tasks])
    return sweep_seconds(work, dict.fromkeys(all_runs, RATES), lanes=lanes)


def test_training_and_float32_measurement_take_time_at_their_own_rates():
    assert seconds_of(RunCost(1000.0, 0, training_flops=500.0), RATES) == 500 / 100 + 500 / 50


def test_runs_share_the_lanes_and_tasks_follow_each_with_a_worker_to_start(small_run):
    own = 15 + EPOCH_SECONDS * small_run.training.epochs
    assert seconds(small_run, runs=1) == pytest.approx(WORKER_SECONDS + own)
    assert seconds(small_run, runs=1, lanes=2) == pytest.approx(WORKER_SECONDS + own / 2)
    assert seconds(small_run, runs=4, lanes=2) == pytest.approx(WORKER_SECONDS + 2 * own)
    assert seconds(small_run, tasks=[100] * 10, lanes=2) == pytest.approx(WORKER_SECONDS + 5 * (2 + TASK_SECONDS))
    assert seconds(small_run, runs=1, tasks=[100]) == pytest.approx(2 * WORKER_SECONDS + own + 2 + TASK_SECONDS)


def test_the_longest_run_and_the_longest_task_are_lower_bounds(small_run):
    own = 15 + EPOCH_SECONDS * small_run.training.epochs
    assert seconds(small_run, runs=3, lanes=4) == pytest.approx(WORKER_SECONDS + own)
    assert seconds(small_run, tasks=[1000, 1], lanes=4) == pytest.approx(WORKER_SECONDS + 20 + TASK_SECONDS)


@pytest.mark.parametrize("kind", ["none", "example_tied", "channel"])
def test_a_runs_own_steps_are_timed_on_one_thread_and_nothing_else_changes(digits, small_run, kind):
    run = replace(small_run, model=replace(small_run.model, width=0.25), dropout=DropoutConfig(kind=kind))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = measure_throughput(run, digits, image_flops=10**6, device=CPU)
    assert found.training > 0 and found.evaluation > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_runs_training_is_five_passes_and_the_rest_is_measurement(digits, small_run):
    cost = run_cost(small_run, digits)
    forward = cost.training_flops / (5 * 200 * small_run.training.epochs)
    n_evaluations = len(small_run.training.evaluated_epochs) + 1
    assert cost.flops - cost.training_flops == pytest.approx(forward * n_evaluations * 260)


def test_what_was_measured_on_a_card_is_read_by_model_and_tiny_tries_are_not(tmp_path):
    rows = [
        {"model": "resnet9", "work": "training with accounting", "flops_per_second": 4.0},
        {"model": "resnet9", "work": "plain training", "flops_per_second": 5.0},
        {"model": "resnet9", "work": "evaluation by 1000", "flops_per_second": 1.0},
        {"model": "resnet9", "work": "evaluation by 5000", "flops_per_second": 2.0},
    ]
    for name, tiny, device in (("gpu_rates", False, "NVIDIA H200"), ("gpu_rates_try", True, "cpu")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"device": device, "tiny": tiny, "rows": rows}))
    assert measured_elsewhere(tmp_path) == {"NVIDIA H200": {"resnet9": Throughput(4.0, 2.0)}}
    assert measured_elsewhere(tmp_path / "nothing") == {}
