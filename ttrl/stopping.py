"""Ending a run early without losing it: the first Ctrl-C asks, the second one insists."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from ttrl.errors import StopRequested


class StopSwitch:
    """Turns SIGINT and SIGTERM into a request that the run answers at the next point where nothing is half done."""

    def __init__(self) -> None:
        self._asked = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSwitch:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._asked = signal.Signals(number).name
        for asked, handler in self._before.items():
            signal.signal(asked, handler)  # a second signal acts as if there were no switch

    def check(self) -> None:
        """Raises StopRequested when a signal came."""
        if self._asked:
            raise StopRequested(f"stopped by {self._asked}")
