"""Ray itself: started quietly on this machine, or joined where it already runs."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from memlib.errors import InputError
from sweeps.autoscaling import CLUSTER_FILE, Growth, read_growth
from sweeps.equipment import CODE_VARIABLE, equipment

SECONDS_TO_ANSWER = 5.0
SECONDS_FOR_A_WORKER = 1200.0  # a new machine boots and installs
SECONDS_FOR_THE_OTHERS = 120.0  # after the first that came

# Read by Ray when it is imported or started, so they are set before that.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment, not one of uv's making
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "3",  # a task that needs too much memory fails in the end
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are ours to write
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # and a lost trial ours to say, in one line
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, not only its newest trial
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that reports its error has no accuracy to report
}
# Read when a worker starts; what each is for was measured (docs/performance.md).
FOR_WORKERS = {
    # By glibc: freed memory stays with the process. Without, at the paper's batch size, up to a fifth of a training
    # step's CPU time is the system's, handing the same pages out again.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    # By torch's OpenMP, before OMP_WAIT_POLICY: a thread that waits for the others soon gives its core up. Workers run
    # at low priority, so where other processes are busy a run on several threads took four times as long without.
    "GOMP_SPINCOUNT": "2000",
}
# What every process of a cluster is told of this one's variables; credentials are each machine's own.
PASSED_ON = ("MEMLIB_STORAGE_PATIENCE",)


@dataclass(frozen=True)
class Capacity:
    """What the cluster has, or can grow to; a trial must fit on one node."""

    cpus: int
    gpus: int
    largest_node_cpus: int
    grows: bool = False  # some of it is not there until work asks for it

    def __str__(self) -> str:
        return f"{'up to ' if self.grows else ''}{self.cpus} CPUs and {self.gpus} GPUs"


def check_address(address: str | None) -> None:
    """Raise InputError for an address that a sweep cannot join, before anything is loaded."""
    if address is not None and address.startswith("ray://"):
        raise InputError(
            f"--address {address} would leave the sweep's driver on this machine, and end it with the connection; "
            "submit it as a job instead (README.md, On a cluster): ray job submit -- memlib/.venv/bin/python "
            "memlib/sweeps/full_paper.py --address auto ..."
        )


def start_ray(address: str | None, *, device: str = "auto", say: Callable[[str], None] = lambda text: None) -> Capacity:
    """Start Ray on this machine, or join the cluster at `address`, and return what it has or can grow to.

    device: `auto` for GPUs where there are any, `cpu` to leave them alone. say: told of a wait for workers.

    Raises:
        InputError: Ray does not start here, no cluster answers at `address`, or it has no worker and none comes.
    """
    set_first = QUIET | FOR_WORKERS
    os.environ.update({key: value for key, value in set_first.items() if key not in os.environ})
    if address is not None:
        _check_answers(address)
        _offer_token()
    import ray  # noqa: PLC0415 - after the environment above

    try:
        ray.init(
            address=address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=_passed_on() if address else None,
        )
    except Exception as error:  # Ray raises it bare where a machine is too slow to start
        raise InputError(_why_not(address, error)) from error
    # Ray prints several lines of its own for each node that is lost, and offers no other way to leave them out.
    vars(import_module("ray._private.worker"))["_worker_logs_enabled"] = False
    growth = None
    if address is not None and _on_head():
        growth = read_growth(Path(CLUSTER_FILE).expanduser(), device=device)
    capacity = _with_growth(present_capacity(), growth)
    if capacity.cpus == 0 or (growth is not None and growth.unasked):
        capacity = _with_growth(_wait_for_workers(growth.unasked if growth else 1, say), growth)
    return replace(capacity, gpus=0) if device == "cpu" else capacity


def _why_not(address: str | None, error: Exception) -> str:
    said = " ".join(str(error).split())
    if address is None:
        return f"Ray did not start on this machine ({said}); it may be too busy or short of memory: try again."
    return (
        f"no Ray cluster answers at --address {address} ({said}); start one with ray start --head, give this "
        "machine the cluster's token (RAY_AUTH_TOKEN), or leave --address out to use this machine."
    )


def stop_ray() -> None:
    """Leave the cluster, and end it if this process started it."""
    import ray  # noqa: PLC0415

    ray.shutdown()


def _passed_on() -> dict[str, Any]:
    # A submitted job's variables reach its workers already, and Ray refuses to be told twice.
    names = () if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else PASSED_ON
    known = {name: os.environ[name] for name in names if name in os.environ}
    told = {name: os.environ.get(name, value) for name, value in FOR_WORKERS.items()}  # the user's own choice, if any
    return {"env_vars": {**told, **known, CODE_VARIABLE: equipment().code}}


def _on_head() -> bool:
    """Return whether this process runs on the cluster's head, where the cluster file is the one it was made from."""
    import ray  # noqa: PLC0415

    return ray.get_runtime_context().gcs_address.rpartition(":")[0] == ray.util.get_node_ip_address()


def present_capacity() -> Capacity:
    """Return what the machines have that are there now."""
    import ray  # noqa: PLC0415

    resources = ray.cluster_resources()
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    return Capacity(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), largest)


def _with_growth(present: Capacity, growth: Growth | None) -> Capacity:
    if growth is None or (growth.cpus <= present.cpus and growth.gpus <= present.gpus):
        return present
    return Capacity(
        max(present.cpus, growth.cpus),
        max(present.gpus, growth.gpus),
        max(present.largest_node_cpus, growth.largest_node_cpus),
        grows=True,
    )


def _wait_for_workers(wanted: int, say: Callable[[str], None]) -> Capacity:
    """Wait for `wanted` workers that come without being asked for, and return what is there then.

    The first is waited for as long as an installation takes, the others only a little longer.

    Raises:
        InputError: none came.
    """
    if _n_workers() < wanted:
        say(f"waiting for {wanted - _n_workers()} workers of the cluster (ray status tells what they do) ...")
    until = time.monotonic() + SECONDS_FOR_A_WORKER
    while (came := _n_workers()) < wanted and time.monotonic() < until:
        if came:
            until = min(until, time.monotonic() + SECONDS_FOR_THE_OTHERS)
        time.sleep(1.0)
    present = present_capacity()
    if present.cpus == 0:
        raise InputError(
            f"the cluster has no CPU to work on, and no worker came in {SECONDS_FOR_A_WORKER / 60:.0f} minutes; "
            "ray status on the head says why (provider local: ssh from the head to the workers, or autoscaler v2)."
        )
    return present


def _n_workers() -> int:
    import ray  # noqa: PLC0415

    return sum(node["Alive"] for node in ray.nodes()) - 1  # all but the head


def _offer_token() -> None:
    """Use the cluster token where there is one: Ray does so unasked only for clusters it starts itself."""
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"]
    if "RAY_AUTH_TOKEN" in os.environ or any(place and Path(place).is_file() for place in places):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _check_answers(address: str) -> None:
    """Try a plain connection first: Ray itself waits long and does not say for what."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise InputError(
            f"nothing answers at --address {address} ({error}); check that the cluster is up and the port open, "
            "or leave --address out to use this machine."
        ) from error
