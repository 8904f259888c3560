"""How the requests of a step are cut into calls of workers. Plain arithmetic, no ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import groupby

from ttrl.types import Request

ENOUGH_REQUESTS = 256
"""What keeps an engine with continuous batching busy (vLLM's default for sequences at once); smaller calls waste its batch."""


def contexts(requests: Sequence[Request]) -> list[list[int]]:
    """Positions of the requests, cut where prompt, prefix or spec change: what an engine samples as one batch.

    Only neighbours belong together, as in the engines, so that the batches are those of a single engine given all requests.
    """
    runs = groupby(
        range(len(requests)), key=lambda i: (requests[i].prompt.id, requests[i].prefix.tobytes(), requests[i].spec)
    )
    return [list(run) for _, run in runs]


class Dealer:
    """Hands out contexts to whoever is idle, which is the least loaded; what comes back is handed out first.

    `at_once` contexts per call; None, for engines that batch as they go: calls start large and shrink to ENOUGH_REQUESTS, so
    that the workers finish together although nobody knows how long answers will be.
    """

    def __init__(self, runs: Sequence[list[int]], workers: int, at_once: int | None) -> None:
        self._runs = deque(runs)
        self._returned: deque[list[int]] = deque()
        self._workers, self._at_once = workers, at_once
        self._left = sum(len(run) for run in runs)
        self._least = min(ENOUGH_REQUESTS, -(-self._left // workers))

    def __bool__(self) -> bool:
        return bool(self._runs or self._returned)

    def take(self) -> list[int]:
        """Positions of the requests of the next call."""
        if self._returned:
            return self._returned.popleft()
        taken = list(self._runs.popleft())
        wanted = max(self._least, -(-self._left // (2 * self._workers)))
        if self._workers == 1:
            wanted = self._left
        count = 1
        while self._runs and (len(taken) < wanted if self._at_once is None else count < self._at_once):
            taken += self._runs.popleft()
            count += 1
        self._left -= len(taken)
        return taken

    def give_back(self, positions: list[int]) -> None:
        """Work of a worker that was lost."""
        self._returned.append(positions)
