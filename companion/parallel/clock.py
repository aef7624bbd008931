"""A virtual clock: what is due is done in order of time; at one time, in the order asked for.

Nothing waits and nothing is random, so the same calls always give the same times.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Clock:
    """Virtual seconds since the start in `now`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple] = []
        self._asked = count()

    def after(self, seconds: float, call: Callable, *arguments: object) -> None:
        """Call `call(*arguments)` when `seconds` more have passed."""
        heappush(self._due, (self.now + seconds, next(self._asked), call, arguments))

    def run(self) -> None:
        """Do everything that is due, until nothing is left."""
        while self._due:
            self.now, _, call, arguments = heappop(self._due)
            call(*arguments)
