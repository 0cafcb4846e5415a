"""Nodes of a real Ray cluster lost in the middle of a sweep: nothing repeated, nothing lost, nothing doubled.

Three nodes on this machine: the driver's, without CPUs, and two of one CPU each, replaced as they are lost.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
from sweeping import (
    TIMEOUT,
    assert_same_results,
    finished_epochs,
    sweep,
    wait_for,
    worker_processes,
    written,
)

from sweeps.cluster import FOR_WORKERS

OPTIONS = ["--seeds", "0", "--epochs", "40", "--experiments", "rewinding", "retraining"]
for setting in ("checkpoints.epochs=[0,2]", "rewinding.limit=50", "retraining.epochs=2", "retraining.limit=50"):
    OPTIONS += ["--set", setting]
RUN = "digits resnet9 noise 0.1 seed 0"
# Read when Ray's processes start: a node that is gone is missed after 5 seconds instead of 17, one that is only slow
# (on a busy machine) after half a minute.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_timeout_ms": "30000",
    "RAY_AUTH_MODE": "disabled",
}
WHY = {"its node was lost", "its process was lost"}  # a node's death may be known later than that of its processes
LOST = re.compile(r"lost: (.*) \((.*)\); trying again \((.*)\)")
# As a cloud's notice reaches Ray: the node takes no more work, and is gone at the deadline.
DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
deadline = int((time.time() + 0.3) * 1000)
accepted, refusal = GcsClient(address=sys.argv[1]).drain_node(sys.argv[2], reason, "spot", deadline)
sys.exit(0 if accepted else refusal)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in IMPATIENT.items():
            patch.setenv(name, value)
        patch.chdir(tmp_path_factory.mktemp("cluster"))
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """One run and its experiments on the same nodes, with nothing happening to them."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    code, out, err = sweep(results, *OPTIONS, "--address", cluster.address)
    assert (code, err) == (0, ""), out + err
    return results


@pytest.fixture
def start_joined(start, cluster):
    return lambda results, *options: start(results, *OPTIONS, "--address", cluster.address, *options)


def work_on(name):
    """A worker process of the cluster that is at work on `name`."""
    wait_for(lambda: worker_processes(psutil.Process(), name), seconds=TIMEOUT)
    return worker_processes(psutil.Process(), name)[0]


def node_of(cluster, worker):
    raylet = worker.ppid()
    return next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet)


def replace(cluster, node):
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)


def ended_well(driver, results, undisturbed):
    out, err = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, out + err
    assert_same_results(results, undisturbed)
    return out


def test_a_node_that_leaves_with_notice_is_not_counted_as_a_failure_and_one_lost_during_a_task_repeats_no_unit(
    cluster, undisturbed, tmp_path, start_joined
):
    results = tmp_path / "results"
    driver = start_joined(results)
    wait_for(lambda: max(finished_epochs(results), default=0) >= 2, seconds=TIMEOUT)
    trial = work_on("ImplicitFunc")
    assert trial.environ().items() >= FOR_WORKERS.items()  # workers of a cluster are told what those of one machine are
    node = node_of(cluster, trial)
    subprocess.run([sys.executable, "-c", DRAIN, cluster.address, node.node_id], check=True)
    time.sleep(0.5)  # the notice's deadline has passed: only then does Ray call a loss the expected one
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGTERM)
    cluster.add_node(num_cpus=1)
    wait_for(lambda: len(written(results, "retraining")) >= 2, seconds=TIMEOUT)
    node = node_of(cluster, work_on("ray::_perform"))
    done = written(results, "rewinding", "retraining")
    replace(cluster, node)
    out = ended_well(driver, results, undisturbed)
    assert "checked 3 nodes" in out
    noticed, *lost = LOST.findall(out)
    assert noticed == (RUN, "its node was taken back", "not counted")
    assert 1 <= len(lost) <= 2, out  # the task at work, and one that was already on its way there
    assert all(task.endswith(f" of {RUN}") and why in WHY and restart == "1 of 3" for task, why, restart in lost), out
    assert done.items() <= written(results, "rewinding", "retraining").items()


def test_a_node_lost_during_a_trial_costs_the_epoch_in_flight_and_a_killed_driver_leaves_the_cluster_to_the_next(
    cluster, undisturbed, tmp_path, start_joined
):
    results = tmp_path / "results"
    driver = start_joined(results)
    wait_for(lambda: max(finished_epochs(results), default=0) >= 2, seconds=TIMEOUT)
    replace(cluster, node_of(cluster, work_on("ImplicitFunc")))
    wait_for(lambda: len(written(results, "rewinding")) >= 2, seconds=TIMEOUT)
    driver.kill()
    out, _ = driver.communicate()
    ((run, why, restart),) = LOST.findall(out)
    assert (run, restart) == (RUN, "1 of 3")
    assert why in WHY, out
    done = written(results, "runs", "rewinding")
    out = ended_well(start_joined(results), results, undisturbed)
    assert LOST.findall(out) == []
    assert done.items() <= written(results, "runs", "rewinding").items()


def test_a_folder_that_is_not_shared_is_named_for_each_node_before_any_compute(cluster, tmp_path, start_joined):
    code = "import os, sys; os.chdir(sys.argv[1]); from sweeps.full_paper import main; sys.exit(main(sys.argv[2:]))"
    options = ["--preset", "quick", "--results", "/proc/self/cwd/results", "--address", cluster.address]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 3 of 3 nodes cannot take part. ")
    assert done.stderr.count("share the folder among all nodes (NFS) or give --results s3://BUCKET/FOLDER") == 3
    assert not (tmp_path / "results" / "runs").exists()
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["memlib-results.json"]


def test_an_open_cluster_is_told_from_one_that_asks_for_a_token(cluster, free_port):
    from sweeps.doors import lets_strangers_in

    assert lets_strangers_in(cluster.address)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    command = [ray, "start", "--head", "--block", f"--port={free_port}", "--num-cpus=0", "--include-dashboard=false"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:  # sockets have short paths
        head = subprocess.Popen([*command, f"--temp-dir={short}"], env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: _accepts(free_port) or head.poll() is not None, seconds=TIMEOUT)
            assert head.poll() is None, "the cluster did not start"
            assert not lets_strangers_in(f"127.0.0.1:{free_port}")
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                process.kill()
            head.wait()


def _accepts(port):
    import socket

    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0
