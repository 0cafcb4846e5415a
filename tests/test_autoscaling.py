from pathlib import Path

import yaml

from memlib.config import RunConfig
from sweeps.autoscaling import read_growth
from sweeps.cluster import Capacity, _with_growth
from sweeps.resources import task_resources, trial_resources

EMPTY = Capacity(cpus=0, gpus=0, largest_node_cpus=0)  # a head that does no work, and no worker yet


def growth(tmp_path, most, **types):
    """What a file says with these types of workers, given as (resources, max_workers, min_workers)."""
    workers = {n: {"resources": r, "max_workers": m, "min_workers": low} for n, (r, m, low) in types.items()}
    types = {"head": {"resources": {"CPU": 0}}, **workers}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"max_workers": most, "head_node_type": "head", "available_node_types": types}))
    return read_growth(file)


def test_the_most_a_cluster_can_have_is_bounded_by_its_types_and_by_all_together(tmp_path):
    found = growth(tmp_path, 5, big=({"CPU": 16}, 3, 0), gpu=({"CPU": 4, "GPU": 1}, 4, 0))
    assert (found.cpus, found.gpus, found.largest_node_cpus) == (3 * 16 + 2 * 4, 4, 16)


def test_a_type_that_may_not_start_does_not_count(tmp_path):
    found = growth(tmp_path, 5, off=({"CPU": 16, "GPU": 1}, 0, 0), cpu=({"CPU": 2}, 5, 2))
    assert (found.cpus, found.gpus, found.largest_node_cpus, found.unasked) == (10, 0, 2, 2)


def test_the_shipped_file_can_grow_to_its_budget():
    found = read_growth(Path(__file__).parent.parent / "cluster.yaml")
    assert (found.cpus, found.gpus, found.unasked) == (8 * 16, 8, 0)


def test_a_sweep_on_cpus_does_not_count_on_machines_with_gpus(tmp_path):
    file = Path(__file__).parent.parent / "cluster.yaml"
    found = read_growth(file, device="cpu")
    assert (found.cpus, found.gpus, found.largest_node_cpus) == (8 * 16, 0, 16)
    growth(tmp_path, 2, gpu=({"CPU": 4, "GPU": 1}, 2, 0))
    only_gpus = read_growth(tmp_path / "cluster.yaml", device="cpu")  # then their CPUs are all there is
    assert only_gpus.cpus == 8


def test_no_file_is_no_growth(tmp_path):
    assert read_growth(tmp_path / "none.yaml") is None


def test_an_empty_cluster_that_can_grow_is_planned_with_as_it_will_be(tmp_path):
    found = growth(tmp_path, 8, gpu=({"CPU": 4, "GPU": 1}, 8, 0))
    capacity = _with_growth(EMPTY, found)
    assert str(capacity) == "up to 32 CPUs and 8 GPUs"
    assert task_resources(RunConfig(), capacity).gpu == 0.25
    assert trial_resources(RunConfig(), capacity, n_runs=3).cpus == 1


def test_runs_on_cpus_fit_on_one_machine_that_is_not_there_yet(tmp_path):
    capacity = _with_growth(EMPTY, growth(tmp_path, 4, cpu=({"CPU": 16}, 4, 0)))
    assert trial_resources(RunConfig(), capacity, n_runs=1).cpus == 16
    assert trial_resources(RunConfig(), capacity, n_runs=8).cpus == 8


def test_a_cluster_at_its_full_size_does_not_grow(tmp_path):
    full = Capacity(cpus=8, gpus=0, largest_node_cpus=4)
    assert _with_growth(full, growth(tmp_path, 2, cpu=({"CPU": 4}, 2, 0))) is full
    assert _with_growth(full, None) is full
