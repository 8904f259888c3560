"""Ending a run early without losing it: the first signal asks, a second Ctrl-C insists."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from ttrl.errors import StopRequested

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers send before SIGKILL; what Slurm sends when told to warn earlier (--signal=B:USR1@120)."""


class StopSwitch:
    """Turns signals into a request that the run answers at the next point where nothing is half done.

    A second Ctrl-C acts as if there were no switch. A scheduler that repeats itself is not impatient: it has SIGKILL for that.
    """

    def __init__(self) -> None:
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSwitch:
        for number in ASKING:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number)
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def check(self) -> None:
        """Raises StopRequested when a signal came."""
        if self._asked is not None:
            stop = StopRequested(f"stopped by {self._asked.name}")
            stop.signal = int(self._asked)
            raise stop
