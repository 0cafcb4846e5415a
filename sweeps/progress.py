"""What a running sweep shows: one live line a run in a terminal, one line an event otherwise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from memlib.config import RunConfig

SECONDS_BETWEEN_LINES = 60.0  # of one run's epochs, where output is not a terminal


@dataclass(frozen=True)
class EpochReport:
    """What a trial tells the driver after an epoch; plain values, as Tune passes them."""

    epoch: int
    seconds: float  # wall time of this epoch
    accuracies: Mapping[str, float]  # by split, fractions


def run_label(config: RunConfig) -> str:
    """Return the run's name in messages."""
    return f"{config.data.name} {config.model.name} noise {config.noise.fraction:g} seed {config.seed}"


class SweepProgress:
    """Shows the runs of a sweep; used as a context."""

    def __init__(self, runs: Sequence[RunConfig], console: Console) -> None:
        self._console = console
        self._runs = {run.run_id: run for run in runs}
        self._seconds: dict[str, list[float]] = {}  # of every epoch so far, epoch 0 included
        self._shown: dict[str, float] = {}
        self._left = len(runs)
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            _TimeLeft(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> SweepProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def started(self, run_id: str) -> None:
        """Show that a run has started, or started again after its process was lost."""
        again = " again" if run_id in self._shown else ""
        self._shown[run_id] = time.monotonic()
        self._seconds[run_id] = []  # a run started again reports its finished epochs once more
        self._line(f"started{again}: {run_label(self._runs[run_id])}")
        if self._console.is_terminal and run_id not in self._tasks:
            run = self._runs[run_id]
            self._tasks[run_id] = self._live.add_task(
                run_label(run), total=run.training.epochs, state="starting", seconds_left=None
            )

    def epoch(self, run_id: str, report: EpochReport) -> None:
        """Show an epoch's accuracies and the time the run still needs."""
        run = self._runs[run_id]
        self._seconds[run_id].append(report.seconds)
        left = _seconds_left(self._seconds[run_id], run.training.epochs)
        state = f"epoch {report.epoch}/{run.training.epochs}  " + "  ".join(
            f"{split} {value:.3f}" for split, value in report.accuracies.items()
        )
        if self._console.is_terminal:
            self._live.update(self._tasks[run_id], completed=report.epoch, state=state, seconds_left=left)
        elif time.monotonic() - self._shown[run_id] > SECONDS_BETWEEN_LINES:
            self._shown[run_id] = time.monotonic()
            self._line(f"{run_label(run)}: {state}" + ("" if left is None else f", {duration(left)} left"))

    def finished(self, run_id: str, error: str | None) -> None:
        """Show how a run ended, and how many are left."""
        self._left -= 1
        label = run_label(self._runs[run_id])
        outcome = (
            f"failed: {label}: {error}" if error else f"done: {label} in {duration(sum(self._seconds.get(run_id, [])))}"
        )
        if run_id in self._tasks:
            self._live.remove_task(self._tasks.pop(run_id))
        self._line(f"{outcome} ({self._left} to go)")

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seconds_left(seconds: list[float], epochs: int) -> float | None:
    """Return the time left from that of every epoch so far; the first only evaluates and tells nothing."""
    trained = seconds[1:]
    return statistics.mean(trained) * (epochs - len(trained)) if trained else None


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left: Any = task.fields.get("seconds_left")
        return Text("" if left is None else f"{duration(left)} left")
