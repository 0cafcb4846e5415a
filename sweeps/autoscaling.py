"""How far a cluster can grow: what the file says that `ray up` was given, which lies on the head.

Workers that are not there yet count: a sweep that planned with the machines of its first second would ask
an empty cluster for nothing, and so it would stay empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CLUSTER_FILE = "~/ray_bootstrap_config.yaml"  # Ray's own name for it


@dataclass(frozen=True)
class Growth:
    """The most a cluster's workers can have at once, and how many of them come without being asked for."""

    cpus: int
    gpus: int
    largest_node_cpus: int
    unasked: int


def read_growth(file: Path, *, device: str = "auto") -> Growth | None:
    """Return what the cluster file at `file` allows; None where there is none.

    device: with `cpu`, machines with GPUs do not count where there are others: Ray starts them for no such work.
    """
    try:
        cluster = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        return None
    workers = {name: t for name, t in cluster["available_node_types"].items() if name != cluster["head_node_type"]}
    if len(cluster["available_node_types"]) == 1:  # of provider `local`: the head's type is the workers' too
        workers = cluster["available_node_types"]
    plain = {name: t for name, t in workers.items() if not t["resources"].get("GPU")}
    workers = plain if device == "cpu" and plain else workers
    most = int(cluster.get("max_workers", 0))
    return Growth(
        _most(workers, "CPU", most),
        _most(workers, "GPU", most),
        max((t["resources"].get("CPU", 0) for t in workers.values() if _limit(t, most) > 0), default=0),
        min(most, sum(t.get("min_workers", 0) for t in workers.values())),
    )


def _most(workers: Mapping[str, Mapping[str, Any]], resource: str, most: int) -> int:
    """Return the most of a resource that `most` workers have together: the richest types first."""
    total = 0
    for node_type in sorted(workers.values(), key=lambda t: -t["resources"].get(resource, 0)):
        n = min(most, _limit(node_type, most))
        total, most = total + n * node_type["resources"].get(resource, 0), most - n
    return total


def _limit(node_type: Mapping[str, Any], most: int) -> int:
    return int(node_type.get("max_workers", most))
