"""Ray's cluster launcher, run on "the laptop" (this machine) against the hosts of a lab."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hosts import ENVIRONMENT, Lab

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
TIMEOUT = 600  # seconds a command of the launcher may take

# Hosts reach no package index: what setup_node.sh would install is bound in, and stands where it would have put it.
SETUP = f"ln -sfn {ENVIRONMENT} ~/memlib/.venv"
# PYTHONPATH: the copy that came by rsync, not this checkout. The time-out: a busy machine starts a dashboard slowly.
PROFILE = "export PYTHONPATH=$HOME/memlib OMP_NUM_THREADS=1 RAY_DASHBOARD_STARTUP_TIMEOUT_S=300"


class Launcher:
    """A cluster file and the commands of `ray` on it."""

    def __init__(self, lab: Lab, config: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self.file = lab.folder / f"{config['cluster_name']}.yaml"
        self.file.write_text(yaml.safe_dump(config))
        self._name = config["cluster_name"]
        self.environment = {
            **os.environ,
            "HOME": str(lab.home),
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            **(environment or {}),
        }
        self("get-auth-token", "--generate")
        self.token = (lab.home / ".ray" / "auth_token").read_text()

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Run `ray ARGUMENTS` in the repository, as the documents say, and return what it prints."""
        done = subprocess.run(
            [str(RAY), *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def up(self) -> str:
        return self("up", "-y", "--no-config-cache", str(self.file))

    def down(self) -> str:
        said = self("down", "-y", str(self.file))
        for kind in ("state", "lock"):  # what the launcher keeps of provider local, on this machine
            Path(f"/tmp/ray/cluster-{self._name}.{kind}").unlink(missing_ok=True)
        return said

    @contextlib.contextmanager
    def dashboard(self) -> Iterator[str]:
        """The dashboard's address on the laptop, through SSH, as long as the context lasts."""
        port = _free_port()
        command = [str(RAY), "dashboard", str(self.file), "--port", str(port)]
        tunnel = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: answers("127.0.0.1", port), 60, "the dashboard's tunnel")
            yield f"http://127.0.0.1:{port}"
        finally:
            tunnel.terminate()
            tunnel.wait()

    def sweep(self, address: str, options: str) -> Sweep:
        """Submit a sweep as a job, as README.md says."""
        command = f"memlib/.venv/bin/python memlib/sweeps/full_paper.py --address auto {options}"
        self("job", "submit", "--address", address, "--no-wait", "--submission-id", "sweep", "--", *command.split())
        return Sweep(self, address)


class Sweep:
    """A submitted sweep."""

    def __init__(self, launcher: Launcher, address: str) -> None:
        self._launcher, self._address = launcher, address

    def log(self) -> str:
        return self._launcher("job", "logs", "--address", self._address, "sweep")

    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self._status() in ("succeeded", "failed", "stopped")

    def wait(self, seconds: float) -> str:
        """Wait for its end and return what it printed; it must have ended well."""
        wait_until(self.ended, seconds, "the end of the sweep")
        assert self._status() == "succeeded", self.log()
        return self.log()

    def _status(self) -> str:
        with urllib.request.urlopen(
            urllib.request.Request(
                f"{self._address}/api/jobs/sweep",
                headers={"Authorization": f"Bearer {self._launcher.token}"},
            ),
            timeout=60,
        ) as answer:
            return json.load(answer)["status"].lower()


def wait_until(condition: Callable[[], bool], seconds: float, what: str, sweep: Sweep | None = None) -> None:
    """Wait for something to come true, but not for longer than it may take nor after its sweep has ended."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}:\n{sweep.log() if sweep else ''}"
        assert sweep is None or not sweep.ended(), f"the sweep ended before {what}:\n{sweep.log()}"
        time.sleep(0.3)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(host: str, port: int) -> bool:
    """Whether a port takes connections."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
