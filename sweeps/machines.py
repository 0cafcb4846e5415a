"""Whether a sweep that says nothing waits for machines: all lost, taken back, or not yet there."""

from __future__ import annotations

import time
from collections.abc import Callable

from sweeps.cluster import Capacity, present_capacity
from sweeps.progress import duration

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_UNTIL_SAID = 60.0  # a node that is replaced at once is no news


class MachineWatch:
    """Says in one line that the cluster has had no CPU at all for a minute, and in another that it has one now.

    wanted: what the sweep was planned for; where that has GPUs, it is those that are looked for.
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
        self._looked = clock()
        self._gone_since: float | None = None  # when it was first seen to be gone
        self._is_said = False

    def look(self) -> None:
        """Look at the cluster, every few seconds however often this is called, and say what has changed."""
        now = self._clock()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        present = self._present()
        if present.gpus if self._kind == "GPU" else present.cpus:
            if self._is_said and self._gone_since is not None:
                self._say(f"the cluster has a {self._kind} now, after {duration(now - self._gone_since)}")
            self._gone_since, self._is_said = None, False
            return
        if self._gone_since is None:
            self._gone_since = now
        waited = now - self._gone_since
        if not self._is_said and waited >= SECONDS_UNTIL_SAID:
            self._say(
                f"waiting: the cluster has had no {self._kind} for {duration(waited)} (ray status on its head tells "
                "why); the sweep goes on when one comes, and Ctrl-C loses nothing that is finished"
            )
            self._is_said = True
