"""Units of work on a finished run, and what is still missing; no torch.

A unit is the smallest thing that is done or not: its id hashes its run and its settings, its rows are
one file of each of its experiment's tables, and it is done when those files are there. A task is what one process
computes at once: the units of one run that share their work.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memlib.config import RunConfig, short_hash


@dataclass(frozen=True)
class Unit:
    """One unit of work on a run; `settings` (JSON values) is everything beside the run that can move its numbers."""

    run: RunConfig
    experiment: str  # the table it writes
    settings: Mapping[str, Any]

    @functools.cached_property
    def unit_id(self) -> str:
        """Return the 16 hexadecimal digits that identify the unit."""
        return short_hash({"run": self.run.run_id, "experiment": self.experiment, **self.settings})


@dataclass(frozen=True)
class Task:
    """Units of one run and experiment that differ in one setting only and are computed together."""

    units: tuple[Unit, ...]

    @property
    def run(self) -> RunConfig:
        """Return the run all units are about."""
        return self.units[0].run

    @property
    def experiment(self) -> str:
        """Return the experiment all units belong to."""
        return self.units[0].experiment


def missing_tasks(tasks: Iterable[Task], done: Mapping[str, set[str]]) -> list[Task]:
    """Return the tasks with only their units that are not in `done` (unit ids by experiment); empty ones left out."""
    missing = [Task(tuple(u for u in task.units if u.unit_id not in done[u.experiment])) for task in tasks]
    return [task for task in missing if task.units]
