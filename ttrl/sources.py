"""Sources: which prompts belong to which step. Pure functions of (seed, step), so resuming needs no stored cursor; only a source
whose steps depend on what came of earlier ones (`refill`) keeps one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ttrl.errors import ConfigError
from ttrl.seeds import generator

VIEW = "@"
"""What stands between the question and the view in the id of a prompt: `q17@1` and `q17@2` ask the same in two wordings."""


class EpochSource:
    """Shuffled epochs, laid end to end; nothing is dropped and nothing comes twice in one step.

    A step that crosses an epoch boundary takes the tail of one epoch and the head of the next. Prompts of that tail are moved
    behind the head, so the step has no duplicates and every epoch still holds each prompt exactly once.
    """

    def __init__(self, ids: Sequence[str], prompts_per_step: int, seed: int) -> None:
        _check_enough(prompts_per_step, ids)
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
        order = _shuffled(self._ids, self._seed, epoch)
        taken = epoch * len(self._ids) % self._per_step  # prompts the crossing step already took from the last epoch
        if not taken:
            return order
        tail = set(self._epochs[epoch - 1][-taken:])
        free = [prompt for prompt in order if prompt not in tail]
        head = free[: self._per_step - taken]
        rest = set(head)
        return head + [prompt for prompt in order if prompt not in rest]


class RefillSource:
    """Shuffled epochs; a step goes on to the next prompts until `prompts_per_step` groups passed the gates (DAPO's dynamic sampling,
    arXiv 2503.14476 section 3.2).

    It walks through the epochs prompt by prompt and remembers where it stands, so every prompt is drawn as often as every other;
    what is trained on more often is what disagrees more often. A step draws no prompt twice: one that the head of the next epoch
    would bring again waits for the next step. `rounds` bounds how often a step draws again; what is missing then stays missing.
    """

    def __init__(self, ids: Sequence[str], prompts_per_step: int, seed: int, *, rounds: int = 10) -> None:
        if rounds < 1:
            raise ValueError(f"refill needs rounds >= 1, got {rounds}; source epoch never draws again")
        _check_enough(prompts_per_step, ids)
        self.rounds = rounds
        self._ids, self._per_step, self._seed = tuple(sorted(ids)), prompts_per_step, seed
        self._epoch, self._place = 0, 0
        self._waiting: list[str] = []
        self._order = _shuffled(self._ids, self._seed, self._epoch)

    def batch(self, step: int) -> list[str]:
        """The first prompts of the next step, [prompts_per_step]. Each call moves on; `step` is not looked at."""
        return self.more(self._per_step, ())

    def more(self, missing: int, drawn: Sequence[str]) -> list[str]:
        """The next prompts of a step that has drawn these, [at most missing]: fewer only when every prompt was drawn."""
        taken, wanted = set(drawn), min(missing, len(self._ids) - len(drawn))
        chosen: list[str] = []
        waiting, self._waiting = self._waiting, []
        while len(chosen) < wanted:
            prompt = waiting.pop(0) if waiting else self._next()
            if prompt in taken:
                self._waiting.append(prompt)
            else:
                chosen.append(prompt)
                taken.add(prompt)
        self._waiting += waiting
        return chosen

    def _next(self) -> str:
        if self._place == len(self._order):
            self._epoch, self._place = self._epoch + 1, 0
            self._order = _shuffled(self._ids, self._seed, self._epoch)
        self._place += 1
        return self._order[self._place - 1]

    def state(self) -> Mapping[str, Any]:
        """Where it stands."""
        return {"epoch": self._epoch, "place": self._place, "waiting": list(self._waiting)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._epoch, self._place, self._waiting = int(state["epoch"]), int(state["place"]), list(state["waiting"])
        self._order = _shuffled(self._ids, self._seed, self._epoch)


class ViewSource:
    """Shuffled epochs of questions that stand in the file in two wordings; a step holds both or neither.

    Two prompts are views of one question when their ids agree up to the last `@`. Raises ConfigError for an id without `@`, a
    question that does not have exactly two views, and an odd number of prompts per step.
    """

    def __init__(self, ids: Sequence[str], prompts_per_step: int, seed: int) -> None:
        if prompts_per_step % 2:
            raise ConfigError(
                f"source views asks every question twice; data.prompts_per_step must be even (it is {prompts_per_step})"
            )
        others = partners(ids)
        self._views = {question_of(one): sorted((one, ids[other])) for one, other in zip(ids, others, strict=True)}
        _check_enough(prompts_per_step, ids)
        self._questions = EpochSource(tuple(self._views), prompts_per_step // 2, seed)

    def batch(self, step: int) -> list[str]:
        """Ids of one step, [prompts_per_step]; the views of a question stand side by side."""
        return [view for question in self._questions.batch(step) for view in self._views[question]]


def _check_enough(wanted: int, ids: Sequence[str]) -> None:
    """Raises ConfigError when a step would need more prompts than there are."""
    if wanted > len(ids):
        raise ConfigError(
            f"data.prompts_per_step is {wanted}, but there are only {len(ids)} prompts; lower it to at most {len(ids)}"
        )


def _shuffled(ids: Sequence[str], seed: int, epoch: int) -> list[str]:
    """The order of one epoch."""
    return [ids[i] for i in generator(seed, "epoch", epoch).permutation(len(ids))]


def question_of(identifier: str) -> str:
    """The id of a prompt up to the last `@`. Raises ConfigError when there is none."""
    question, separator, _ = identifier.rpartition(VIEW)
    if not separator:
        raise ConfigError(
            f"prompt {identifier!r} does not say which question it words; ids of views look like 'q17{VIEW}1' and 'q17{VIEW}2'"
        )
    return question


def partners(ids: Sequence[str]) -> list[int]:
    """[n] for each id the position of the other view of its question. Raises ConfigError unless every question has two views here.

    Golden: a@1, b@1, b@2, a@2 -> [3, 2, 1, 0]
    """
    places: dict[str, list[int]] = {}
    for place, identifier in enumerate(ids):
        places.setdefault(question_of(identifier), []).append(place)
    for question, found in places.items():
        if len(found) != 2:
            shown = ", ".join(repr(ids[place]) for place in found[:3])
            raise ConfigError(
                f"question {question!r} has {len(found)} view(s) here ({shown}), and needs two: ids that agree up to the last "
                f"'{VIEW}' in the prompts file, and both before data.limit"
            )
    return [sum(places[question_of(identifier)]) - place for place, identifier in enumerate(ids)]
