"""The workers of a pool: started together, replaced one by one, never waited for without a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ttrl.cluster import Cluster, Lost
from ttrl.config.schema import Recipe
from ttrl.errors import ClusterError
from ttrl.rollout.worker import Traits, Worker

log = logging.getLogger(__name__)


class Crew:
    """Handles by index. A replacement keeps the index, the seat and the name of the one before."""

    def __init__(self, recipe: Recipe, nodes: Cluster, options: Mapping[str, Any]) -> None:
        """`options` of the engine are added to those of the recipe."""
        self._recipe, self._nodes = recipe, nodes
        engine = recipe.rollout.engine
        self._engine = engine.model_copy(update={"options": {**engine.options, **options}})
        self._left = recipe.cluster.replacements
        self.replaced = 0
        """workers replaced so far"""
        self.handles: list[Any] = []
        self.starting: dict[int, Any] = {}
        """Replacements that are not ready: index -> reference to their Traits."""
        self.blank: set[int] = set()
        """Replacements that do not have the weights of the last sync."""
        self.traits: Traits
        """of all of them"""
        try:
            self.traits = self._first_start()
        except BaseException:
            self.close()
            raise

    def _first_start(self) -> Traits:
        """All at once. A worker that cannot start is not replaced: the next one could not either."""
        section = self._recipe.cluster
        for index in range(section.workers):
            self.handles.append(self._launch(index))
        starts = [self._start(index) for index in range(section.workers)]
        found: list[Traits] = self._nodes.get(
            starts, seconds=section.start_seconds, what="starting the rollout workers", may_stop=True
        )
        if any(other != found[0] for other in found):
            raise ClusterError(
                f"the rollout workers differ: {sorted(map(str, set(found)))}; do all nodes see the same model and versions?"
            )
        return found[0]

    def __len__(self) -> int:
        return len(self.handles)

    def replace(self, index: int, lost: Lost) -> Any:
        """End a lost worker and start another; returns the reference that says when it is ready.

        Raises ClusterError when the budget of the run is used up.
        """
        if self._left == 0:
            raise ClusterError(
                f"{lost.who} {lost.reason}\nand all {self._recipe.cluster.replacements} replacements of this run are used up "
                "(cluster.replacements)"
            )
        self._left -= 1
        self.replaced += 1
        log.warning("%s %s; replacing it (%d replacements left)", lost.who, lost.reason, self._left)
        self._nodes.kill(self.handles[index])
        self.handles[index] = self._launch(index)
        self.blank.add(index)
        self.starting[index] = self._start(index)
        return self.starting[index]

    def ready(self, index: int, traits: Traits) -> None:
        """A replacement has started."""
        del self.starting[index]
        assert traits.max_positions == self.traits.max_positions

    def wait_for_replacements(self) -> None:
        """Until all have started; each has the time of a start."""
        while self.starting:
            index, ref = next(iter(self.starting.items()))
            [found] = self._nodes.settle([ref], seconds=self._recipe.cluster.start_seconds, what="a replacement")
            if isinstance(found, Lost):
                self.replace(index, found)
            else:
                self.ready(index, found)

    def everyone(self, call: Callable[[Any], Any], *, what: str, prepare: Callable[[], None]) -> list[Any]:
        """The results of one call of every worker, in order, made again by replacements of those that are lost.

        `prepare` brings replacements to the state the call needs.
        """
        results: dict[int, Any] = {}
        while missing := [i for i in range(len(self)) if i not in results]:
            self.wait_for_replacements()
            prepare()
            refs = [call(self.handles[i]) for i in missing]
            found = self._nodes.settle(refs, seconds=self._recipe.cluster.call_seconds, what=what)
            for index, value in zip(missing, found, strict=True):
                if isinstance(value, Lost):
                    self.replace(index, value)
                else:
                    results[index] = value
        return [results[i] for i in range(len(self))]

    def close(self) -> None:
        """End them all, busy or not."""
        for handle in self.handles:
            self._nodes.kill(handle)

    def _launch(self, index: int) -> Any:
        return self._nodes.launch(f"rollout worker {index}", Worker, self._nodes.worker_options(index))

    def _start(self, index: int) -> Any:
        return self.handles[index].start.remote(self._engine, self._recipe.model)
