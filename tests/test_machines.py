"""A sweep that has nothing to work on says so once, and once that it goes on."""

import pytest

from sweeps.cluster import Capacity
from sweeps.machines import MachineWatch

NOTHING, ONE_CPU, ONE_GPU = Capacity(0, 0, 0), Capacity(4, 0, 4), Capacity(4, 1, 4)


class Cluster:
    """A clock, and what is there at each of its seconds."""

    def __init__(self, present):
        self.seconds, self.looks, self.present = 0.0, 0, present

    def watch(self, wanted):
        said = []
        watch = MachineWatch(wanted, said.append, present=self._look, clock=lambda: self.seconds)
        return watch, said

    def _look(self):
        self.looks += 1
        return self.present(self.seconds)


def lived_through(wanted, present, seconds):
    cluster = Cluster(present)
    watch, said = cluster.watch(wanted)
    lines = {}
    for second in range(1, seconds):
        cluster.seconds = float(second)
        before = len(said)
        watch.look()
        lines |= {second: said[-1]} if len(said) > before else {}
    return lines, cluster


def test_machines_that_are_there_are_no_news_and_looking_is_rare():
    lines, cluster = lived_through(ONE_CPU, lambda _: ONE_CPU, 600)
    assert lines == {}
    assert cluster.looks <= 600 / 5


@pytest.mark.parametrize(("lost", "back", "waited"), [(0, 300, "5 min"), (100, 180, "75 s")])
def test_a_cluster_without_machines_is_said_once_after_a_minute_and_once_when_it_has_some_again(lost, back, waited):
    lines, _ = lived_through(ONE_CPU, lambda second: NOTHING if lost < second < back else ONE_CPU, 600)
    (said, first), (again, second) = lines.items()
    assert lost + 60 <= said <= lost + 70
    assert first.startswith("waiting: the cluster has had no CPU for 6")
    assert "Ctrl-C loses nothing that is finished" in first
    assert back <= again < back + 5
    assert second == f"the cluster has a CPU now, after {waited}"


def test_a_node_that_is_replaced_within_a_minute_is_no_news():
    assert lived_through(ONE_CPU, lambda second: NOTHING if 100 < second < 150 else ONE_CPU, 300)[0] == {}


def test_each_time_without_machines_is_said():
    lines, _ = lived_through(ONE_CPU, lambda second: NOTHING if second // 100 % 2 else ONE_CPU, 800)
    assert [line.split()[0] for line in lines.values()] == ["waiting:", "the"] * 3 + ["waiting:"]


def test_a_sweep_planned_for_gpus_waits_for_those():
    lines, _ = lived_through(ONE_GPU, lambda second: ONE_CPU if second < 200 else ONE_GPU, 300)
    assert [line for line in lines.values() if "no GPU" in line or "a GPU now" in line] == list(lines.values())
    assert len(lines) == 2


def test_a_driver_that_could_not_look_for_long_does_not_call_that_time_without_machines():
    cluster = Cluster(lambda second: ONE_CPU if second < 400 else NOTHING)
    watch, said = cluster.watch(ONE_CPU)
    for second in (10.0, 401.0):  # busy in between
        cluster.seconds = second
        watch.look()
    assert said == []
