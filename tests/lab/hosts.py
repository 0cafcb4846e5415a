"""Machines to test a cluster on: network, mount, pid, uts and ipc namespaces each, one bridge, one real sshd each.

A host has its own /root, /tmp, /run and /dev/shm; only `shared` is seen by all, as /tmp/shared. The Python
environment is bound in, since hosts cannot install: everything else reaches them by Ray's own SSH and rsync.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ENVIRONMENT = Path(sys.prefix)
NEEDED = {"sshd": "openssh-server", "rsync": "rsync", "ip": "iproute2", "ssh-keygen": "openssh-client"}
OWN = ("/root", "/tmp", "/run")  # folders of which each host has its own
FIRST = 11  # last number of the first host's address
SECONDS_TO_ANSWER = 20


def why_not() -> str | None:
    """Why `ray up` on hosts of our own cannot be tried here, or None."""
    if any(importlib.util.find_spec(module) is None for module in ("aiohttp_cors", "boto3", "moto")):
        return "Ray's launcher and boto3 are not in this environment: make lab-test"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [package for program, package in NEEDED.items() if _program(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"], capture_output=True, text=True
    )
    if tried.returncode:
        return f"this machine allows no namespaces: {tried.stderr.strip()}"
    for kind, way in (("bridge", "type bridge"), ("pair of links", "type veth peer name memlibtestp")):
        made = subprocess.run(["ip", "link", "add", "memlibtest", *way.split()], capture_output=True, text=True)
        if made.returncode:
            return f"this machine allows no {kind}: {made.stderr.strip()}"
        subprocess.run(["ip", "link", "del", "memlibtest"], check=True)
    return None


class Lab:
    """A bridge and the hosts on it; used as a context, which ends every process it started."""

    def __init__(self, folder: Path, profile: str = "") -> None:
        self.folder = folder
        self.shared = folder / "shared"
        self.home = folder / "home"
        self.key = folder / "keys" / "id"
        self.profile = profile  # lines of every host's ~/.bashrc
        self._hosts: dict[int, subprocess.Popen] = {}
        self._namespaces: list[str] = []
        taken = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
        self._name = next(f"memlib{i}" for i in range(100) if f"memlib{i}b" not in taken)
        self.network = f"10.79.{self._name.removeprefix('memlib')}"
        self.gateway = f"{self.network}.1"

    def address(self, host: int) -> str:
        return f"{self.network}.{FIRST + host}"

    def host_at(self, address: str) -> int:
        return int(address.rsplit(".", 1)[1]) - FIRST

    def __enter__(self) -> Lab:
        for folder in (self.shared, self.home, self.key.parent):
            folder.mkdir(parents=True)
        for name in ("id", "host"):
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(self.key.parent / name)], check=True)
        _ip(f"link add {self._name}b type bridge")
        _ip(f"addr add {self.gateway}/24 dev {self._name}b")
        _ip(f"link set {self._name}b up")
        return self

    def __exit__(self, *exception: object) -> None:
        for host in list(self._hosts):
            self.kill(host)
        for namespace in self._namespaces:
            _ip(f"netns del {namespace}")
        _ip(f"link del {self._name}b")

    def start(self, *hosts: int) -> None:
        """Boot hosts, and wait until each one's sshd answers; one that was killed finds its files again."""
        for host in hosts:
            self._boot(host)
        for host in hosts:
            until = time.monotonic() + SECONDS_TO_ANSWER
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection((self.address(host), 22), timeout=1).close()
                    break
                assert time.monotonic() < until, (self._root(host) / "sshd.log").read_text()
                time.sleep(0.05)

    def kill(self, host: int) -> None:
        """End a host's pid 1, and so, by the kernel, every process on it."""
        outer = self._hosts.pop(host)
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(outer.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        outer.kill()
        outer.wait()

    def run_on(self, host: int, command: str) -> str:
        """Run a command on a host as root's login shell would, and return what it prints."""
        process = self.start_on(host, command)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output

    def start_on(self, host: int, command: str) -> subprocess.Popen:
        """Start a command on a host; its output and errors are one stream."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        return subprocess.Popen(
            ["ssh", *(part for option in options for part in ("-o", option)), "-i", str(self.key)]
            + [f"root@{self.address(host)}", f"bash -lic {shlex.quote(command)}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _root(self, host: int) -> Path:
        return self.folder / f"h{host}"

    def _boot(self, host: int) -> None:
        root, name = self._root(host), f"{self._name}n{host}"
        if not root.exists():
            self._furnish(host)
            _ip(f"netns add {name}")
            self._namespaces.append(name)
            _ip(f"link add {self._name}v{host} type veth peer name eth0 netns {name}")
            _ip(f"link set {self._name}v{host} master {self._name}b up")
            _ip(f"-n {name} addr add {self.address(host)}/24 dev eth0")
            _ip(f"-n {name} link set lo up")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} route add default via {self.gateway}")  # Ray finds its own address by it
        with open(root / "sshd.log", "a") as log:
            self._hosts[host] = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc"]
                + ["bash", "-c", self._script(root, f"{self._name}-{host}")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _furnish(self, host: int) -> None:
        root = self._root(host)
        for folder in ("root/.ssh", "tmp/shared", "run/sshd", "etc"):
            (root / folder).mkdir(parents=True)
        (root / "tmp").chmod(0o1777)
        for profile in (".bashrc", ".profile"):
            (root / "root" / profile).write_text(f"export PATH={ENVIRONMENT}/bin:$PATH\n{self.profile}\n")
        # No name is looked up: an unreachable name server would hold every start of Ray for 20 seconds.
        (root / "etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
        (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{self.address(host)} {self._name}-{host}\n")
        shutil.copy(self.key.parent / "host", root / "run/host_key")
        shutil.copy(self.key.with_suffix(".pub"), root / "run/authorized_keys")
        settings = {
            "ListenAddress": self.address(host),
            "HostKey": "/run/host_key",
            "AuthorizedKeysFile": "/run/authorized_keys",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "PidFile": "none",
            "MaxStartups": "100",
            "MaxSessions": "100",
        }
        (root / "run/sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))

    def _script(self, root: Path, name: str) -> str:
        """What pid 1 of a host does: its own folders over the machine's, then sshd."""
        binds = []
        for place in _environment_folders():
            if place.startswith(OWN):
                Path(f"{root}{place}").mkdir(parents=True, exist_ok=True)
                binds.append(f"mount --bind {place} {root}{place}")
        return "\n".join(
            [
                "set -e; mount --make-rprivate /",
                f"hostname {name}",
                *binds,
                f"mount --bind {self.shared} {root}/tmp/shared",
                f"mount --bind {root}/etc/resolv.conf /etc/resolv.conf; mount --bind {root}/etc/hosts /etc/hosts",
                f"mount --rbind {root}/root /root; mount --bind {root}/run /run",
                "mount -t tmpfs tmpfs /dev/shm",
                f"mount --rbind {root}/tmp /tmp",
                "export HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                f"exec env -i HOME=$HOME PATH=$PATH {_program('sshd')} -D -e -f /run/sshd_config",
            ]
        )


def _environment_folders() -> list[str]:
    """This environment, the one it lies on, and their Python."""
    below = {str(Path(place).parents[2]) for place in sys.path if place.endswith("site-packages")}
    return sorted({str(ENVIRONMENT), sys.base_prefix, *below})


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
