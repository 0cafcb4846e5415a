"""Whether a sweep that says nothing waits for machines: all lost, taken back, or not yet there."""

from __future__ import annotations

import time
from collections.abc import Callable

from sweeps.cluster import Capacity, present_capacity
from sweeps.progress import duration

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_UNTIL_SAID = 60.0  # a node that is replaced at once is no news


class MachineWatch:
    """Says in one line that the cluster has had nothing to work on for a minute, and in another that it has again.

    wanted: what the sweep was planned for; where that has GPUs, machines without one do not count.
    """

    def __init__(
        self,
        wanted: Capacity,
        say: Callable[[str], None],
        *,
        present: Callable[[], Capacity] = present_capacity,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kind = "GPU" if wanted.gpus else "CPU"
        self._say = say
        self._present = present
        self._clock = clock
        self._last_seen = self._looked = clock()
        self._is_said = False

    def look(self) -> None:
        """Look at the cluster, every few seconds however often this is called, and say what has changed."""
        now = self._clock()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        present = self._present()
        waited = now - self._last_seen
        if present.gpus if self._kind == "GPU" else present.cpus:
            if self._is_said:
                self._say(f"the cluster has a {self._kind} again, after {duration(waited)}")
            self._last_seen, self._is_said = now, False
        elif not self._is_said and waited >= SECONDS_UNTIL_SAID:
            self._say(
                f"waiting: the cluster has had no {self._kind} for {duration(waited)} (ray status on its head tells "
                "why); the sweep goes on when one comes, and Ctrl-C loses nothing that is finished"
            )
            self._is_said = True
