"""What a plan says it costs: the time of its FLOPs at throughputs measured with the runs' own steps."""

import json
from dataclasses import replace

import pytest
import torch

from memlib.config import DropoutConfig
from memlib.dropout_modes import predict_by_mode
from memlib.runs import build_network, place_data, prepare_data
from memlib.training import training_step
from sweeps import costs, throughput
from sweeps.cluster import Capacity
from sweeps.costs import image_flops, run_cost
from sweeps.estimates import (
    EPOCH_SECONDS,
    TASK_SECONDS,
    WORKER_SECONDS,
    Rates,
    RunCost,
    Work,
    seconds_of,
    sweep_seconds,
)
from sweeps.preflight import dataset_key
from sweeps.throughput import Throughput, measure_throughput, measured_elsewhere

CPU = torch.device("cpu")
RATES = Throughput(training=100.0, evaluation=50.0)


def seconds(run, runs=0, tasks=(), *, lanes):
    """The estimate for `runs` equal runs of 1,000 FLOPs, half of them training, and tasks of so many FLOPs."""
    all_runs = [replace(run, seed=seed) for seed in range(max(runs, 1))]
    cost = RunCost(1000.0, 0, training_flops=500.0)
    work = Work(dict.fromkeys(all_runs[:runs], cost), [(run, RunCost(float(flops), 0)) for flops in tasks])
    rates = dict.fromkeys(all_runs, RATES)
    return sweep_seconds(work, Rates(rates, rates), lanes=lanes)


def test_training_and_float32_measurement_take_time_at_their_own_rates():
    assert seconds_of(RunCost(1000.0, 0, training_flops=500.0), RATES) == 500 / 100 + 500 / 50


def test_runs_share_the_lanes_and_tasks_follow_each_with_a_worker_to_start(small_run):
    own = 15 + EPOCH_SECONDS * small_run.training.epochs
    assert seconds(small_run, runs=1, lanes=1) == pytest.approx(WORKER_SECONDS + own)
    assert seconds(small_run, runs=4, lanes=2) == pytest.approx(WORKER_SECONDS + 2 * own)
    assert seconds(small_run, tasks=[100] * 10, lanes=2) == pytest.approx(WORKER_SECONDS + 5 * (2 + TASK_SECONDS))
    both = seconds(small_run, runs=1, tasks=[100], lanes=1)
    assert both == pytest.approx(2 * WORKER_SECONDS + own + 2 + TASK_SECONDS)


def test_the_longest_run_and_the_longest_task_are_lower_bounds(small_run):
    own = 15 + EPOCH_SECONDS * small_run.training.epochs
    assert seconds(small_run, runs=1, lanes=2) == pytest.approx(WORKER_SECONDS + own)
    assert seconds(small_run, runs=3, lanes=4) == pytest.approx(WORKER_SECONDS + own)
    assert seconds(small_run, tasks=[1000, 1], lanes=4) == pytest.approx(WORKER_SECONDS + 20 + TASK_SECONDS)


def test_a_run_is_timed_on_the_threads_it_will_have_and_a_task_on_one(digits, small_run, monkeypatch):
    timed = []

    def measure(run, dataset, image_flops, device, *, threads):
        timed.append(threads)
        return RATES

    monkeypatch.setattr(costs, "measure_throughput", measure)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    images = {dataset_key(small_run): digits}
    work = Work({small_run: RunCost(1000.0, 0)}, [(small_run, RunCost(100.0, 0))])
    costs.estimate_times([work], images, Capacity(cpus=4, gpus=0, largest_node_cpus=4))
    assert timed == [4, 1]
    runs = {replace(small_run, seed=seed): RunCost(1000.0, 0) for seed in range(2)}
    costs.estimate_times([Work(runs, [])], images, Capacity(cpus=4, gpus=0, largest_node_cpus=4))
    assert timed[2:] == [2]
    (text,) = costs.estimate_times([Work({small_run: RunCost(1e4, 0)}, [])], images, Capacity(16, 0, 16))
    assert timed[3:] == [4]  # all there are here; the others count as much
    assert text == f"about {WORKER_SECONDS + 1e4 / (50 * 4) + EPOCH_SECONDS * small_run.training.epochs:.0f} s"


@pytest.mark.parametrize("kind", ["none", "example_tied", "channel"])
def test_a_runs_own_steps_are_timed_and_nothing_else_changes(digits, small_run, kind, monkeypatch):
    steps = []

    def step(state, batch, **options):
        steps.append((torch.get_num_threads(), len(batch[1])))
        return training_step(state, batch, **options)

    monkeypatch.setattr(throughput, "training_step", step)
    monkeypatch.setattr(throughput, "STEP_SECONDS", 1e9)  # so that the whole batch fits, however busy the machine is
    run = replace(small_run, model=replace(small_run.model, width=0.25), dropout=DropoutConfig(kind=kind))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = measure_throughput(run, digits, image_flops=10**6, device=CPU, threads=2)
    assert {on for on, _ in steps} == {2}
    assert steps[-1] == (2, run.training.batch_size)
    assert found.training > 0 and found.evaluation > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seconds_an_image", [0.0, 0.01, 0.1, 10.0])
@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_a_timed_step_takes_as_many_images_as_fit_into_its_time(seconds_an_image, batch_size):
    n = throughput._affordable(batch_size, lambda n: n * seconds_an_image)
    assert n <= batch_size
    assert n * seconds_an_image <= throughput.STEP_SECONDS or n == 2
    assert n == batch_size or n * seconds_an_image >= throughput.STEP_SECONDS / 2


@pytest.mark.usefixtures("shallow_vit")
@pytest.mark.parametrize(("model", "kind"), [("resnet9", "none"), ("resnet9", "example_tied"), ("vit", "example_tied")])
def test_a_run_costs_five_passes_a_step_and_one_for_every_image_predicted(digits, small_run, model, kind):
    model = replace(small_run.model, name=model, width=0.25 if model == "resnet9" else 1.0)
    run = replace(small_run, model=model, dropout=DropoutConfig(kind=kind))
    cost = run_cost(run, digits)
    forward = image_flops(run, digits)
    assert cost.training_flops == 5 * forward * 200 * run.training.epochs
    model = build_network(run, digits)
    predicted = []
    # Before every pass, by the images that enter it: the network's own first convolution sees each of them once.
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda module, inputs: predicted.append(len(inputs[0])))
    predict_by_mode(model, place_data(prepare_data(run, digits), digits.digest, CPU), device=CPU)
    in_training = len(run.training.evaluated_epochs) * (200 + 60)
    assert cost.flops - cost.training_flops == forward * (in_training + sum(predicted))


def test_what_was_measured_on_a_card_is_read_by_model_and_tiny_tries_are_not(tmp_path):
    rows = [
        {"model": "resnet9", "work": "training with accounting", "flops_per_second": 4.0},
        {"model": "resnet9", "work": "plain training", "flops_per_second": 5.0},
        {"model": "resnet9", "work": "evaluation by 1000", "flops_per_second": 1.0},
        {"model": "resnet9", "work": "evaluation by 5000", "flops_per_second": 2.0},
        {"model": "resnet9", "work": "evaluation, contiguous", "flops_per_second": 3.0},  # not how a run evaluates
    ]
    for name, tiny, device in (("gpu_rates", False, "NVIDIA H200"), ("gpu_rates_try", True, "cpu")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"device": device, "tiny": tiny, "rows": rows}))
    assert measured_elsewhere(tmp_path) == {"NVIDIA H200": {"resnet9": Throughput(4.0, 2.0)}}
    assert measured_elsewhere(tmp_path / "nothing") == {}
