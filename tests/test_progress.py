"""What a sweep shows of experiments whose tasks are parts of many examples."""

import io
import re

from rich.console import Console

from memlib.config import RunConfig
from memlib.experiments import CriticalUnitsConfig, ExperimentsConfig, RewindingConfig
from memlib.tasks import plan_tasks
from sweeps import progress
from sweeps.progress import SweepProgress

RUN = RunConfig()
SEARCH = CriticalUnitsConfig(examples=8, part_size=4)


def shown(tasks, *, terminal=False):
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200)
    with SweepProgress([RUN], console) as show:
        show.tasks_added(tasks)
        for task in tasks:
            show.task_ended(task, None)
    return written.getvalue()


def test_the_search_for_critical_units_is_counted_in_examples(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    out = shown(plan_tasks(RUN, ExperimentsConfig(critical_units=SEARCH), ("classifier",)))
    assert re.findall(r"\d+/16 examples", out) == ["4/16 examples", "8/16 examples", "12/16 examples"]
    assert out.endswith("done: critical_units of cifar10 resnet9 noise 0.1 seed 0 (0 units of experiments to go)\n")


def test_in_a_terminal_the_examples_stand_in_the_live_line():
    tasks = plan_tasks(RUN, ExperimentsConfig(critical_units=SEARCH), ("classifier",))
    assert "16/16 examples" in shown(tasks, terminal=True)


def test_a_long_search_is_told_at_most_once_a_minute():
    out = shown(plan_tasks(RUN, ExperimentsConfig(critical_units=SEARCH), ("classifier",)))
    assert out.count("examples") == 1


def test_other_experiments_are_not_counted_in_examples():
    assert "examples" not in shown(plan_tasks(RUN, ExperimentsConfig(rewinding=RewindingConfig()), ("classifier",)))
