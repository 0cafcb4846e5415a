"""Whether strangers can use a cluster: whoever reaches an open one runs code on its machines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import ray

from memlib.errors import InputError

SECONDS_TO_ANSWER = 30.0
_REFUSED = 3
# In a process of its own: Ray reads its mode of authentication once.
_KNOCK = f"""
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit({_REFUSED})
"""


def check_doors(*, insecure: bool) -> None:
    """Raise InputError if the cluster that was joined spans machines and lets anybody in, unless `insecure`."""
    addresses = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    if insecure or not is_reachable(addresses, ray.util.get_node_ip_address()):
        return
    cluster = ray.get_runtime_context().gcs_address
    if lets_strangers_in(cluster):
        raise InputError(
            f"the cluster at {cluster} works for anybody who reaches its ports, with no token asked for; start it "
            "with RAY_AUTH_MODE=token on every machine (README.md, On a cluster), or give --insecure if nobody can "
            "reach it."
        )


def is_reachable(addresses: Sequence[str], own: str) -> bool:
    """Return whether a cluster with nodes at these addresses is more than this machine."""
    return any(address not in (own, "127.0.0.1") for address in addresses)


def lets_strangers_in(cluster: str) -> bool:
    """Return whether the cluster at HOST:PORT answers a process without its token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    environment["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-c", _KNOCK, cluster]
    try:
        knock = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS_TO_ANSWER)
    except subprocess.TimeoutExpired:
        return False
    return knock.returncode != _REFUSED
