"""Nodes of a real Ray cluster lost in the middle of a sweep: nothing repeated, nothing lost, nothing doubled.

Four nodes on this machine: the driver's, without CPUs, and three of one CPU each, replaced as they are lost.
"""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from s3_server import BUCKET, credentials, s3_server
from sweeping import TIMEOUT, assert_same_results, finished_epochs, sweep, wait_for, worker_processes
from test_sweep_experiments import OPTIONS

from memlib.results import open_results

# Read when Ray's processes start: a node is missed after 3 seconds instead of 17.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_AUTH_MODE": "disabled",
}
OPTIONS = [*OPTIONS, "--seeds", "0", "--experiments", "rewinding", "retraining", "--epochs", "6"]
OPTIONS += ["--set", "checkpoints.epochs=[0,2]"]
LOST = re.compile(r"lost: (.*) \((.*)\); trying again \((.*)\)")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One run and its experiments that nothing happened to, on this machine alone."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    code, out, err = sweep(results, *OPTIONS)
    assert (code, err) == (0, ""), out + err
    return results


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IMPATIENT.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def lose(cluster, worker):
    """Cut the node off that the worker process runs on, and put another in its place."""
    parent = worker.parent().pid
    (node,) = [n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == parent]
    cluster.add_node(num_cpus=1)
    cluster.remove_node(node, allow_graceful=False)
