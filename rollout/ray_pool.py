"""Many engines in other processes, with the results of one: the same requests give the same rollouts, whoever takes them.

A worker that dies or hangs is replaced, gets the weights of the last sync and takes over; requests carry their seeds, so nothing
changes but the time it takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ttrl.cluster import Cluster, Lost
from ttrl.cluster.transport import DIRECT, transport
from ttrl.config.schema import Recipe
from ttrl.errors import ClusterError, EngineError
from ttrl.model.load import load_tokenizer
from ttrl.protocols import WeightSource
from ttrl.rollout.crew import Crew
from ttrl.rollout.dealing import Dealer, contexts
from ttrl.rollout.delivery import Arrival, KeptRefs, delivery
from ttrl.rollout.pool import check_arrival, check_rollouts
from ttrl.types import FloatArray, IntArray, Request, Rollout


@dataclass(frozen=True, slots=True)
class _Call:
    """What a worker is busy with: requests by position, or its own start."""

    worker: int
    positions: list[int] | None
    deadline: float
    seconds: float


class RayPool:
    """The Pool over `cluster.workers` actors. Used by one thread at a time, except for `keep`."""

    def __init__(self, recipe: Recipe, nodes: Cluster) -> None:
        kind = transport(recipe, on_gpus=nodes.placement.gpus > 0)  # raises before anything is started
        self.tokenizer = load_tokenizer(recipe.model.path)
        self._nodes, self._section = nodes, recipe.cluster
        self._delivery = delivery(nodes, recipe, kind)
        self._crew = Crew(recipe, nodes, {"transfer": kind} if kind in DIRECT else {})
        self._expected = self._crew.traits.weights
        self._held: WeightSource | None = None
        """What a replacement is given; None before the first sync, when it starts with the right weights."""
        self._trainer_moves_on = recipe.rollout.ahead > 0
        self._told = 0
        self._closed = False

    @property
    def has_weights(self) -> bool:
        """False for engines that only play a script."""
        return self._crew.traits.has_weights

    @property
    def takes_adapters(self) -> bool:
        """The engines want LoRA adapters as they are."""
        return self._crew.traits.takes_adapters

    @property
    def max_positions(self) -> int | None:
        """Longest prompt plus completion, if there is a limit."""
        return self._crew.traits.max_positions

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order, whatever happens to workers. Raises ClusterError when too many are lost."""
        self._update_replacements()
        dealer = Dealer(contexts(requests), len(self._crew), self._crew.traits.contexts_at_once)
        results: dict[int, Rollout] = {}
        idle, busy = deque(range(len(self._crew))), dict[Any, _Call]()
        while dealer or any(call.positions is not None for call in busy.values()):
            while idle and dealer:
                self._assign(idle.popleft(), dealer.take(), requests, busy)
            for call, outcome in self._next(busy):
                if isinstance(outcome, Lost):
                    if call.positions is not None:
                        dealer.give_back(call.positions)
                    self._add(
                        busy, self._crew.replace(call.worker, outcome), call.worker, None, self._section.start_seconds
                    )
                elif call.positions is None:
                    self._crew.ready(call.worker, outcome)
                    self._update_replacements(wait=False)
                    idle.append(call.worker)
                else:
                    answered = [requests[i] for i in call.positions]
                    check_rollouts(answered, outcome, self._expected)
                    results.update(zip(call.positions, outcome, strict=True))
                    idle.append(call.worker)
        return [results[i] for i in range(len(requests))]

    def _assign(self, worker: int, positions: list[int], requests: Sequence[Request], busy: dict[Any, _Call]) -> None:
        ref = self._crew.handles[worker].generate.remote([requests[i] for i in positions])
        self._add(busy, ref, worker, positions, self._section.call_seconds)

    @staticmethod
    def _add(busy: dict[Any, _Call], ref: Any, worker: int, positions: list[int] | None, seconds: float) -> None:
        busy[ref] = _Call(worker, positions, time.monotonic() + seconds, seconds)

    def _next(self, busy: dict[Any, _Call]) -> list[tuple[_Call, Any]]:
        """Calls that ended, one way or another; they leave `busy`."""
        if self._closed:  # the sampling thread of rollout.ahead may outlive the run by a moment
            raise ClusterError("the pool was closed")
        seconds = min(call.deadline for call in busy.values()) - time.monotonic()
        ready, _ = self._nodes.wait(list(busy), seconds=seconds, may_stop=True)
        found = [(busy.pop(ref), self._nodes.outcome(ref, what="sampling")) for ref in ready]
        late = [ref for ref, call in busy.items() if call.deadline <= time.monotonic()]
        return found + [(call, self._nodes.overdue(ref, call.seconds)) for ref in late for call in [busy.pop(ref)]]

    def sync(self, source: WeightSource, *, must_move: bool) -> None:
        """New weights to every worker. Raises EngineError when they did not arrive, or moved nothing although they had to."""
        self._crew.wait_for_replacements()
        if self._trainer_moves_on:
            source = KeptRefs.of(source, self._nodes)
        before = self._expected
        arrived = self._deliver(source, range(len(self._crew)))
        stamps, fingerprints = [a.stamp for a in arrived], [a.fingerprint for a in arrived]
        check_arrival(source.version, stamps, fingerprints, before if must_move else None)
        self._held, self._expected = source, stamps[0]

    def _deliver(self, source: WeightSource, workers: Sequence[int]) -> list[Arrival]:
        """To these workers; replacements of those that are lost on the way get everything from the start."""
        arrived: dict[int, Arrival] = {}
        while missing := [i for i in workers if i not in arrived]:
            receipts = self._delivery.send([self._crew.handles[i] for i in missing], source)
            for index, receipt in zip(missing, receipts, strict=True):
                if isinstance(receipt, Lost):
                    self._crew.replace(index, receipt)
                elif isinstance(receipt, Arrival):
                    arrived[index] = receipt
                    self._crew.blank.discard(index)
            self._crew.wait_for_replacements()
        return [arrived[i] for i in workers]

    def _update_replacements(self, *, wait: bool = True) -> None:
        """The weights of the last sync for those that came after it."""
        if wait:
            self._crew.wait_for_replacements()
        blank = sorted(self._crew.blank - self._crew.starting.keys())
        if self._held is None:
            self._crew.blank -= set(blank)  # they start with the weights everyone has; a wrong stamp shows at once
        elif blank:
            for index, arrival in zip(blank, self._deliver(self._held, blank), strict=True):
                if arrival.stamp != self._expected:
                    raise EngineError(
                        f"rollout worker {index} was replaced and holds {arrival.stamp}, not {self._expected}"
                    )

    def keep(self, source: WeightSource) -> WeightSource:
        """A copy in the object store, for a later sync."""
        return KeptRefs.of(source, self._nodes)

    def score(self, token_ids: IntArray) -> list[FloatArray]:
        """[T] -> per worker [T - 1] of log-probs at temperature 1."""
        return self._crew.everyone(
            lambda worker: worker.score.remote(token_ids), what="scoring the canary", prepare=self._update_replacements
        )

    @contextmanager
    def released(self) -> Iterator[None]:
        """Every engine leaves its accelerator to the trainer."""
        self._crew.everyone(lambda worker: worker.release.remote(), what="releasing GPUs", prepare=lambda: None)
        yield
        self._crew.everyone(lambda worker: worker.restore.remote(), what="taking GPUs back", prepare=lambda: None)

    def events(self) -> Mapping[str, float]:
        """Workers replaced since the last call."""
        new, self._told = self._crew.replaced - self._told, self._crew.replaced
        return {"cluster/replaced": float(new)}

    def close(self) -> None:
        """Ends the workers."""
        self._closed = True
        self._crew.close()
