"""Trainer ranks as Ray actors, and the one trainer that the loop sees.

The driver deals micro-batches, asks all ranks at once and waits with a deadline. A rank that dies or hangs takes the others with it:
they cannot go on without it, so all are ended and the run fails; its last checkpoint can be resumed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ttrl.cluster import Cluster, Lost
from ttrl.errors import ClusterError, TtrlError
from ttrl.model.buckets import unpack
from ttrl.model.outlet import Outlet
from ttrl.protocols import WeightSource
from ttrl.trainers.dealing import computed_tokens, deal
from ttrl.trainers.dsconfig import DEFAULT_STAGE
from ttrl.trainers.process_group import Place
from ttrl.trainers.rank_actor import RankActor
from ttrl.trainers.rankstep import merge
from ttrl.types import AdapterSpec, FloatArray, IntArray, PackedBatch, StepStats

if TYPE_CHECKING:
    from ttrl.trainers.backends import TrainerSetup

COLLECTIVE = re.compile(r"gloo|nccl|timed out|timeout|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""What torch says, in errors of no type of their own, when ranks lose each other."""
GRACE_SECONDS = 10.0
"""How long to look for the rank that is to blame when another one reports a broken collective."""


class RankGroup:
    """A Trainer over `cluster.ranks` actors. Raises ClusterError when one of them is lost."""

    def __init__(self, setup: TrainerSetup, cluster: Cluster) -> None:
        assert setup.recipe is not None, "ranks build their parts from the recipe"
        self.version = 0
        self._setup, self._cluster, self._section = setup, cluster, setup.cluster
        self._split = (DEFAULT_STAGE if setup.trainer.zero is None else setup.trainer.zero) == 3
        self._ended = ""
        count = self._section.ranks
        self._actors = [
            cluster.launch(f"trainer rank {rank}", RankActor, cluster.rank_options(rank)) for rank in range(count)
        ]
        deadline = time.monotonic() + self._section.start_seconds
        self.shares_prompts = self._start(deadline)

    def _start(self, deadline: float) -> bool:
        """Ranks meet at an address of rank 0 and load the model; returns whether prompts are computed once."""
        count = len(self._actors)
        calls, starts = float(self._section.call_seconds), float(self._section.start_seconds)

        def wait(refs: list[Any], what: str) -> list[Any]:
            return self._results(refs, max(deadline - time.monotonic(), 0.0), what, may_stop=True)

        addresses = wait([actor.address.remote() for actor in self._actors], "starting the trainer ranks")
        opened = self._actors[0].open_store.remote(addresses[0], count, starts)
        master = wait([opened], "opening the meeting point of the trainer ranks")[0]
        started = []
        for rank, actor in enumerate(self._actors):
            place = Place(
                rank=rank, ranks=count, address=addresses[rank], master=master, seconds=calls, start_seconds=starts
            )
            started.append(actor.start.remote(self._setup.recipe, place))
        return bool(wait(started, "starting the trainer ranks")[0])

    def step(self, step: int, updates: Sequence[Sequence[PackedBatch]]) -> StepStats:
        """As of one trainer. The user's wish to stop is honoured before, not during the step: a step is all or nothing."""
        self._setup.check_stop()

        def cost(batch: PackedBatch) -> int:
            return computed_tokens(batch, shared_prompt=self.shares_prompts)

        dealt = [deal(batches, len(self._actors), cost) for batches in updates]
        what = f"training step {step}"
        calls = [(step, [parts[rank] for parts in dealt]) for rank in range(len(self._actors))]
        refs = [actor.step.remote(*call) for actor, call in zip(self._running(what), calls, strict=True)]
        parts = self._results(refs, self._seconds, what)
        self.version = max(self.version, step) + 1  # after a restore it is ahead of the steps
        return merge(parts)

    def weights(self, *, adapter: bool = False) -> WeightSource:
        """Buckets in the cluster's object store, made one after the other while they are asked for."""
        what = "asking for the weights"
        described = self._results([self._running(what)[0].describe.remote(adapter=adapter)], self._seconds, what)
        version, manifest, spec = described[0]
        return RankWeights(self, version, manifest, spec, bucket_bytes=self._section.bucket_mb << 20)

    def bucket_refs(self, bucket_bytes: int, *, adapter: bool) -> Iterator[Any]:
        """As `RemoteWeights`. Under ZeRO-3 every rank takes part in making a bucket, otherwise rank 0 has all there is."""
        what = "making a bucket of weights"
        makers = self._holders(what)
        self._results([actor.begin.remote(bucket_bytes, adapter=adapter) for actor in makers], self._seconds, what)
        while True:
            made = [actor.bucket.options(num_returns=2).remote() for actor in self._holders(what)]
            if not self._results([flag for _, flag in made], self._seconds, what)[0]:
                return
            bucket = made[0][0]
            del made
            yield bucket
            del bucket

    def send(self, work: Callable[[Outlet], None], what: str) -> None:
        """`work` on every rank."""
        self._results([actor.outlet.remote(work) for actor in self._running(what)], self._seconds, what)

    def fetch(self, ref: Any) -> Any:
        """A bucket into this process."""
        return self._results([ref], self._seconds, "fetching a bucket of weights")[0]

    def score(self, token_ids: IntArray) -> FloatArray:
        """As of one trainer."""
        what = "scoring the canary text"
        refs = [actor.score.remote(token_ids) for actor in self._holders(what)]
        scores: FloatArray = self._results(refs, self._seconds, what)[0]
        return scores

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """On every rank."""
        self._everyone("teach", "turning to the weights of the teacher", True)
        yield
        self._everyone("teach", "turning back from the weights of the teacher", False)

    def save(self, path: Path) -> None:
        """Every rank writes its part. Raises ClusterError when one cannot be seen here: nodes must share the file system."""
        self._everyone("save", "saving the trainer", path.absolute())
        missing = [
            rank for rank in range(len(self._actors)) if not (path / f"rank-{rank:04d}.trained.safetensors").exists()
        ]
        if missing:
            raise ClusterError(
                f"saving the trainer: the part of rank {missing[0]} is not in {path.absolute()}; the output folder must be on a "
                "file system that all nodes share"
            )

    def load(self, path: Path) -> None:
        """Raises ValueError for a state of another arrangement of ranks."""
        self.version = self._everyone("load", "loading the trainer", path.absolute())[0]

    def restore(self, path: Path, *, version: int) -> None:
        """Raises ConfigError for a state of another arrangement of ranks."""
        self.version = self._everyone("restore", "restoring the trainer", path.absolute(), version)[0]

    def scale_lr(self, factor: float) -> None:
        """On every rank."""
        self._everyone("scale_lr", "changing the learning rate", factor)

    def export(self, path: Path) -> None:
        """Written by rank 0."""
        self._everyone("export", "exporting the model", path.absolute())

    def close(self) -> None:
        """Ends the ranks."""
        self._end("closed")

    def _running(self, what: str) -> list[Any]:
        """All ranks. Raises ClusterError when they were ended."""
        if self._ended:
            raise ClusterError(f"{what}: the trainer ranks were ended before ({self._ended})")
        return self._actors

    def _holders(self, what: str) -> list[Any]:
        """Ranks that are needed to see a whole weight."""
        ranks = self._running(what)
        return ranks if self._split else ranks[:1]

    @property
    def _seconds(self) -> float:
        """A collective inside the call ends first, and says which rank waited."""
        return float(self._section.call_seconds) + GRACE_SECONDS

    def _everyone(self, method: str, what: str, *arguments: object) -> list[Any]:
        refs = [getattr(actor, method).remote(*arguments) for actor in self._running(what)]
        return self._results(refs, self._seconds, what)

    def _results(self, refs: list[Any], seconds: float, what: str, *, may_stop: bool = False) -> list[Any]:
        """Of one call, in the order of the ranks. After any failure the ranks are out of step, so all of them are ended."""
        try:
            return self._cluster.get(refs, seconds=seconds, what=what, may_stop=may_stop)
        except BaseException as error:
            cause = self._cause(refs, what) if _is_broken_collective(error) else error
            self._end(f"{type(cause).__name__}: {cause}")
            if cause is error:
                raise
            raise cause from error

    def _cause(self, refs: list[Any], what: str) -> BaseException:
        """Why a collective broke: what another rank raised, else ClusterError with those that died or do not answer."""
        deadline = time.monotonic() + GRACE_SECONDS
        waiting, lost, said = list(refs), [], []
        while waiting:
            ready, waiting = self._cluster.wait(waiting, seconds=deadline - time.monotonic())
            if not ready:
                lost += [self._cluster.overdue(ref, self._section.call_seconds) for ref in waiting]
                break
            for ref in ready:
                try:
                    outcome = self._cluster.outcome(ref, what=what)
                except Exception as error:  # noqa: BLE001 - a plug-in may raise anything, and it is raised again
                    if not _is_broken_collective(error):
                        return error
                    said.append(f"another rank reports: {str(error).strip().splitlines()[0]}")
                    continue
                if isinstance(outcome, Lost):
                    lost.append(outcome)
        return ClusterError("\n".join([f"{what}: " + "\n".join(f"{item.who} {item.reason}" for item in lost), *said]))

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = reason.partition("\n")[0]
            for actor in self._actors:
                self._cluster.kill(actor)


def _is_broken_collective(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and not isinstance(error, TtrlError) and bool(COLLECTIVE.search(str(error)))


class RankWeights:
    """A WeightSource whose tensors are in the ranks. Iterating brings them here, bucket by bucket."""

    def __init__(
        self, group: RankGroup, version: int, manifest: Mapping[str, tuple[int, ...]], adapter: AdapterSpec | None,
        *, bucket_bytes: int,
    ) -> None:  # fmt: skip
        self.version, self.manifest, self.adapter = version, manifest, adapter
        self._group, self._bytes = group, bucket_bytes

    def bucket_refs(self, bucket_bytes: int) -> Iterator[Any]:
        """References to buckets in the object store. Raises ClusterError when training went on since this source was made."""
        self._check_version()
        return self._group.bucket_refs(bucket_bytes, adapter=self.adapter is not None)

    def send(self, work: Callable[[Outlet], None], what: str) -> None:
        """As `DirectWeights`; for whole weights, not adapters."""
        assert self.adapter is None
        self._check_version()
        self._group.send(work, what)

    def _check_version(self) -> None:
        if self._group.version != self.version:
            raise ClusterError(
                f"the weights of version {self.version} are gone: the trainer is at {self._group.version}"
            )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from unpack(self._group.fetch(ref) for ref in self.bucket_refs(self._bytes))
