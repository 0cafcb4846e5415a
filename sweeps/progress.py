"""What a running sweep shows: one live line a run in a terminal, one line an event otherwise."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.text import Text

from memlib.config import RunConfig
from memlib.experiments import CriticalUnitsConfig
from memlib.units import Task

SECONDS_BETWEEN_LINES = 60.0  # of one run's epochs, where output is not a terminal


@dataclass(frozen=True)
class EpochReport:
    """What a trial tells the driver after an epoch; plain values, as Tune passes them."""

    epoch: int
    seconds: float  # wall time of this epoch
    accuracies: Mapping[str, float]  # by split, fractions


def run_label(config: RunConfig) -> str:
    """Return the run's name in messages, e.g. `digits resnet9 example_tied one_cycle noise 0.1 seed 0`."""
    dropout, schedule = config.dropout.kind, config.training.schedule
    unlike_main = [part for part in (dropout, schedule) if part not in ("none", "cosine")]
    names = " ".join([config.data.name, config.model.name, *unlike_main])
    return f"{names} noise {config.noise.fraction:g} seed {config.seed}"


def task_label(task: Task, name_run: Callable[[RunConfig], str] = run_label) -> str:
    """Return the task's name in messages, e.g. `rewinding conv1 of mnist resnet9 noise 0.1 seed 0`."""
    settings = task.units[0].settings
    if task.experiment == "critical_units":
        what = f" part {settings['part']} of the {settings['kind']} examples"
    elif task.experiment == "cross_validation":
        what = f" fold {settings['fold'] + 1}/{settings['folds']}"
    else:
        groups = settings.get("groups", [settings["group"]] if "group" in settings else [])
        what = f" {'+'.join(groups)}" if groups else ""
    return f"{task.experiment}{what} of {name_run(task.run)}"


def n_examples(task: Task) -> int:
    """Return how many examples a task searches the critical units of, at most; 0 for any other task."""
    if task.experiment != "critical_units":
        return 0
    return task.units[0].settings.get("part_size", CriticalUnitsConfig().part_size) * len(task.units)


class SweepProgress:
    """Shows the runs of a sweep, each by its name; used as a context."""

    def __init__(
        self, runs: Sequence[RunConfig], console: Console, name_run: Callable[[RunConfig], str] = run_label
    ) -> None:
        self._console = console
        self._name_run = name_run
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
        self._units = Counter[tuple[str, str]]()  # still to do, by experiment and run label
        self._searched, self._to_search = Counter[str](), Counter[str]()  # examples, by run label
        self._n_units = self._n_units_ended = 0
        self._units_bar: TaskID | None = None

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
        self.say(f"started{again}: {self._name_run(self._runs[run_id])}")
        if self._console.is_terminal and run_id not in self._tasks:
            run = self._runs[run_id]
            self._tasks[run_id] = self._live.add_task(
                self._name_run(run), total=run.training.epochs, state="starting", seconds_left=None
            )

    def epoch(self, run_id: str, report: EpochReport) -> None:
        """Show an epoch's accuracies and the time the run still needs."""
        run = self._runs[run_id]
        self._seconds[run_id].append(report.seconds)
        left = _seconds_left(self._seconds[run_id], run.training.epochs)
        shares = [f"{split} {value:.3f}" for split, value in report.accuracies.items()]  # none if not evaluated
        state = "  ".join([f"epoch {report.epoch}/{run.training.epochs}", *shares])
        if self._console.is_terminal:
            self._live.update(self._tasks[run_id], completed=report.epoch, state=state, seconds_left=left)
        elif self._is_silent_for_long(run_id):
            self._shown[run_id] = time.monotonic()
            self.say(f"{self._name_run(run)}: {state}" + ("" if left is None else f", {duration(left)} left"))

    def lost(self, run_id: str, why: str, restart: str) -> None:
        """Say that a run lost its process or node and is started again."""
        self.say(f"lost: {self._name_run(self._runs[run_id])} ({why}); trying again ({restart})")

    def note(self, run_id: str, text: str) -> None:
        """Say what a run's process has to say."""
        self.say(f"{self._name_run(self._runs[run_id])}: {text}")

    def finished(self, run_id: str, error: str | None) -> None:
        """Show how a run ended, early or not, and how many are left."""
        self._left -= 1
        run, seconds = self._runs[run_id], self._seconds.get(run_id, [])
        outcome = f"done: {self._name_run(run)} in {duration(sum(seconds))}"
        if error is not None:
            outcome = f"failed: {self._name_run(run)}: {error}"
        elif 0 < len(seconds) <= run.training.epochs:
            outcome = f"stopped after {len(seconds) - 1} epochs: {self._name_run(run)}"
        if run_id in self._tasks:
            self._live.remove_task(self._tasks.pop(run_id))
        self.say(f"{outcome} ({self._left} to go)")

    def tasks_added(self, tasks: Iterable[Task]) -> None:
        """Count the units of experiments that are now wanted."""
        for task in tasks:
            self._units[task.experiment, self._name_run(task.run)] += len(task.units)
            self._n_units += len(task.units)
            self._to_search[self._name_run(task.run)] += n_examples(task)
        self._show_units("waiting")

    def task_lost(self, task: Task, why: str, restart: str) -> None:
        """Say that a task lost its process or node and is started again."""
        self.say(f"lost: {task_label(task, self._name_run)} ({why}); trying again ({restart})")

    def task_note(self, task: Task, text: str) -> None:
        """Say what a task's process had to say."""
        self.say(f"{task_label(task, self._name_run)}: {text}")

    def task_ended(self, task: Task, error: str | None) -> None:
        """Count a task's units as done, and say when an experiment on a run is complete or a task failed."""
        key = (task.experiment, self._name_run(task.run))
        self._units[key] -= len(task.units)
        self._n_units_ended += len(task.units)
        self._searched[key[1]] += n_examples(task)
        label = task_label(task, self._name_run)
        self._show_units(label + self._spell_searched(task))
        if error is not None:
            self.say(f"failed: {label}: {error}")
        if self._units[key] == 0:
            left = self._n_units - self._n_units_ended
            self.say(f"done: {task.experiment} of {key[1]} ({left} units of experiments to go)")
        elif n_examples(task) and not self._console.is_terminal and self._is_silent_for_long(task.run.run_id):
            self._shown[task.run.run_id] = time.monotonic()
            self.say(f"{task.experiment} of {key[1]}{self._spell_searched(task)}")

    def say(self, text: str) -> None:
        """Print one line, above the live ones in a terminal."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _is_silent_for_long(self, run_id: str) -> bool:
        return run_id not in self._shown or time.monotonic() - self._shown[run_id] > SECONDS_BETWEEN_LINES

    def _spell_searched(self, task: Task) -> str:
        label = self._name_run(task.run)
        return f": {self._searched[label]}/{self._to_search[label]} examples" if n_examples(task) else ""

    def gave_up(self, tasks: Sequence[Task], n_failed: int) -> None:
        """Say that tasks of one experiment on one run are not started, as so many before them failed in a row."""
        n_units = sum(len(task.units) for task in tasks)
        self._units[tasks[0].experiment, self._name_run(tasks[0].run)] -= n_units
        self._n_units_ended += n_units
        self.say(
            f"gave up: {tasks[0].experiment} of {self._name_run(tasks[0].run)}: {n_failed} tasks in a row failed, "
            f"{n_units} units are not started"
        )

    def _show_units(self, state: str) -> None:
        if not self._console.is_terminal or self._n_units == 0:
            return
        if self._units_bar is None:
            self._units_bar = self._live.add_task("experiments", total=None, state="", seconds_left=None)
        self._live.update(
            self._units_bar,
            total=self._n_units,
            completed=self._n_units_ended,
            state=f"{self._n_units_ended}/{self._n_units} units  {state}",
        )


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
    def render(self, task: rich_progress.Task) -> Text:
        left: Any = task.fields.get("seconds_left")
        return Text("" if left is None else f"{duration(left)} left")
