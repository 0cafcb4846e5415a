"""What a trial or a task asks Ray for."""

from __future__ import annotations

from dataclasses import dataclass

from memlib.config import RunConfig
from sweeps.cluster import Capacity

GPU_SHARE = {"resnet9": 0.25, "vit": 0.5}  # of a card, for the models small enough to share one


@dataclass(frozen=True)
class Resources:
    """What one trial or task asks for; `gpu` is a share of a card, 0 for the CPU alone."""

    cpus: int
    gpu: float


def trial_resources(run: RunConfig, capacity: Capacity, *, n_runs: int) -> Resources:
    """Return what a run asks for on a cluster with `n_runs` to do.

    On GPUs a small model takes a share of a card and one CPU; without any, the CPUs are divided
    among the runs, at least one and at most a node's each.
    """
    if capacity.gpus:
        return task_resources(run, capacity)
    return Resources(max(1, min(capacity.cpus // n_runs, capacity.largest_node_cpus)), 0.0)


def task_resources(run: RunConfig, capacity: Capacity) -> Resources:
    """Return what a task on a finished run asks for: one CPU, and on GPUs its model's share of a card."""
    return Resources(1, GPU_SHARE.get(run.model.name, 1.0) if capacity.gpus else 0.0)
