"""Sources: which prompts belong to which step. Pure functions of (seed, step), so resuming needs no stored cursor."""

from __future__ import annotations

from collections.abc import Sequence

from ttrl.errors import ConfigError
from ttrl.seeds import generator


class EpochSource:
    """Shuffled epochs, laid end to end; nothing is dropped and nothing comes twice in one step.

    A step that crosses an epoch boundary takes the tail of one epoch and the head of the next. Prompts of that tail are moved
    behind the head, so the step has no duplicates and every epoch still holds each prompt exactly once.
    """

    def __init__(self, ids: Sequence[str], prompts_per_step: int, seed: int) -> None:
        if prompts_per_step > len(ids):
            raise ConfigError(
                f"data.prompts_per_step is {prompts_per_step}, but there are only {len(ids)} prompts; lower it to at most {len(ids)}"
            )
        self._ids = tuple(sorted(ids))  # the order of the file does not matter
        self._per_step = prompts_per_step
        self._seed = seed
        self._epochs: list[list[str]] = []

    def batch(self, step: int) -> list[str]:
        """Ids of one step, [prompts_per_step]."""
        size, start = len(self._ids), step * self._per_step
        positions = range(start, start + self._per_step)
        return [self._epoch(p // size)[p % size] for p in positions]

    def _epoch(self, number: int) -> list[str]:
        while len(self._epochs) <= number:
            self._epochs.append(self._shuffled(len(self._epochs)))
        return self._epochs[number]

    def _shuffled(self, epoch: int) -> list[str]:
        order = [self._ids[i] for i in generator(self._seed, "epoch", epoch).permutation(len(self._ids))]
        taken = epoch * len(self._ids) % self._per_step  # prompts the crossing step already took from the last epoch
        if not taken:
            return order
        tail = set(self._epochs[epoch - 1][-taken:])
        free = [prompt for prompt in order if prompt not in tail]
        head = free[: self._per_step - taken]
        rest = set(head)
        return head + [prompt for prompt in order if prompt not in rest]
