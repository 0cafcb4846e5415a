"""What a process runs with: all processes of a sweep must have the same, also those on nodes that join it late."""

from __future__ import annotations

import functools
import os
import platform
import socket
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import memlib
from memlib.code_version import source_digest
from memlib.errors import InputError

_PACKAGES = (Path(memlib.__file__).parent, Path(__file__).parent)
CODE_VARIABLE = "MEMLIB_DRIVER_CODE"  # set by the driver for every process of a cluster


@dataclass(frozen=True)
class Equipment:
    """Versions, and of memlib a digest of its source: a commit says nothing of what was changed since."""

    python: str
    ray: str
    torch: str
    memlib: str

    @property
    def code(self) -> str:
        """Return what can move a number, in one line."""
        return f"memlib {self.memlib}, torch {self.torch}"


@functools.lru_cache
def equipment() -> Equipment:
    """Return what this process runs with."""
    return Equipment(platform.python_version(), version("ray"), version("torch"), source_digest(_PACKAGES))


def check_code() -> None:
    """Raise InputError where this process does not run the driver's code; it knows that on a cluster only."""
    expected = os.environ.get(CODE_VARIABLE)
    if expected is not None and expected != equipment().code:
        raise InputError(
            f"{socket.gethostname()} runs {equipment().code} and the driver {expected}; install the driver's there."
        )
