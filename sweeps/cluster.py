"""Ray itself: started quietly on this machine, or joined where it already runs."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlib.errors import InputError
from sweeps.equipment import CODE_VARIABLE, equipment

SECONDS_TO_ANSWER = 5.0

# Read by Ray when it is imported or started, so they are set before that.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers use this environment, not one of uv's making
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "3",  # a task that needs too much memory fails in the end
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are ours to write
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep, not only its newest trial
}
# What every process of a cluster is told of this one's variables; credentials are each machine's own.
PASSED_ON = ("MEMLIB_STORAGE_PATIENCE",)


@dataclass(frozen=True)
class Capacity:
    """What the cluster has; a trial must fit on one node."""

    cpus: int
    gpus: int
    largest_node_cpus: int


def start_ray(address: str | None) -> Capacity:
    """Start Ray on this machine, or join the cluster at `address`, and return what it has.

    Raises:
        InputError: no cluster answers at `address`.
    """
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
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
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no Ray cluster answers at --address {address} ({error}); start one with ray start --head, give this "
            "machine the cluster's token (RAY_AUTH_TOKEN), or leave --address out to use this machine."
        ) from error
    resources = ray.cluster_resources()
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return Capacity(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), largest)


def stop_ray() -> None:
    """Leave the cluster, and end it if this process started it."""
    import ray  # noqa: PLC0415

    ray.shutdown()


def _passed_on() -> dict[str, Any]:
    known = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {"env_vars": {**known, CODE_VARIABLE: equipment().code}}


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
