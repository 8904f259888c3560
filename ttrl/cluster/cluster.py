"""A running cluster: actors that are started, called with a deadline, and described when they are lost."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttrl.cluster.placement import Placement, Seat
from ttrl.config.schema import ClusterSection
from ttrl.errors import ClusterError, ConfigError
from ttrl.protocols import StopCheck

POLL_SECONDS = 0.2
"""How often a wait looks whether the user wants to stop."""
TAIL_LINES = 15
CLOSE_SECONDS = 20.0

# Idle OpenMP threads must sleep, not spin; what the driver was told about hubs and threads holds for everyone
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
_FORWARDED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_LOGGING_LEVEL")


@dataclass(frozen=True, slots=True)
class Lost:
    """An actor that will not answer a call: dead, or over its deadline. `who` is what `Cluster.launch` was told."""

    who: str
    reason: str
    """What happened, and the last lines of its log."""


@dataclass(frozen=True, slots=True)
class _Actor:
    """What is remembered of an actor. `place` is a reference to (node id, pid, log files), ready soon after its start."""

    name: str
    handle: Any
    place: Any


class Cluster:
    """Made by `connect`. Safe to use from several threads."""

    def __init__(
        self, section: ClusterSection, placement: Placement, check_stop: StopCheck, *, private: Path | None
    ) -> None:
        self.section, self.placement = section, placement
        self._check_stop, self._private = check_stop, private
        self._groups: list[Any] = []
        self._actors: dict[str, _Actor] = {}
        self._closed = False
        self._gone = False
        """Nobody listens at the head node any more, so there is nobody to say good-bye to."""

    @property
    def is_private(self) -> bool:
        """Started by this run, and ended by it."""
        return self._private is not None

    def reserve(self) -> None:
        """Take the bundles of the placement. Raises ClusterError when others hold them for longer than start_seconds."""
        import ray

        for bundles in self.placement.groups:
            wanted = [{k: v for k, v in (("CPU", b.cpus), ("GPU", b.gpus)) if v} for b in bundles]
            self._groups.append(ray.util.placement_group(wanted, strategy="STRICT_PACK"))
        deadline = time.monotonic() + self.section.start_seconds
        for group in self._groups:
            while not group.wait(1):
                self._check_stop()
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"the cluster did not give {self.placement.cpus:g} CPUs and {self.placement.gpus:g} GPUs within "
                        f"{self.section.start_seconds} s (cluster.start_seconds): other jobs hold them; see `ray status`"
                    )

    def worker_options(self, index: int) -> dict[str, Any]:
        """Ray options of rollout worker `index`: its share of a bundle, and its environment."""
        return self._options(self.placement.workers[index])

    def rank_options(self, index: int) -> dict[str, Any]:
        """Ray options of trainer rank `index`."""
        return self._options(self.placement.ranks[index])

    def _options(self, seat: Seat) -> dict[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._groups[seat.group],
            placement_group_bundle_index=seat.bundle,
            placement_group_capture_child_tasks=True,
        )
        told = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
        return {
            "num_cpus": seat.cpus,
            "num_gpus": seat.gpus,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": {**_ENVIRONMENT, **told, **seat.env}},
        }

    def launch(self, name: str, kind: type, options: dict[str, Any], *arguments: Any) -> Any:
        """Start an actor and return its handle at once. `name` is how messages call it, such as "rollout worker 0".

        What may fail or take long belongs into a method: an exception of a constructor loses its type on the way.
        """
        import ray

        handle: Any = ray.remote(kind).options(max_restarts=0, max_task_retries=0, **options).remote(*arguments)
        self._actors[handle._actor_id.hex()] = _Actor(name, handle, handle.__ray_call__.remote(_place))
        return handle

    def kill(self, handle: Any) -> None:
        """End an actor at once, busy or not."""
        import ray

        self._actors.pop(handle._actor_id.hex(), None)
        ray.kill(handle, no_restart=True)

    def node_of(self, handle: Any) -> str:
        """The node an actor is on, or, for None, this process; empty when it cannot be said."""
        import ray

        if handle is None:
            return str(ray.get_runtime_context().get_node_id())
        actor = self._actors.get(handle._actor_id.hex())
        with contextlib.suppress(ray.exceptions.RayError):
            return str(ray.get(actor.place, timeout=CLOSE_SECONDS)[0]) if actor is not None else ""
        return ""

    def put(self, value: Any) -> Any:
        """A reference to a copy in the object store."""
        import ray

        return ray.put(value)

    def get(self, refs: Sequence[Any], *, seconds: float, what: str, may_stop: bool = False) -> list[Any]:
        """The results, in order. The first failure ends the wait: what our code raised in the actor is raised here as it is,
        with the remote traceback as a note; a lost actor or the deadline raises ClusterError.

        `may_stop`: the user's wish to stop is honoured while waiting. Only where nothing is left half done.
        """
        results: dict[Any, Any] = {}
        deadline = time.monotonic() + seconds
        waiting = list(refs)
        while waiting:
            ready, waiting = self.wait(waiting, seconds=deadline - time.monotonic(), may_stop=may_stop)
            if not ready:
                lost = self.overdue(waiting[0], seconds)
                raise ClusterError(f"{what}: {lost.who} {lost.reason}")
            for ref in ready:
                results[ref] = self.outcome(ref, what=what)
                if isinstance(results[ref], Lost):
                    raise ClusterError(f"{what}: {results[ref].who} {results[ref].reason}")
        return [results[ref] for ref in refs]

    def settle(self, refs: Sequence[Any], *, seconds: float, what: str) -> list[Any]:
        """One result or Lost per call, in order: like `get`, but the loss of an actor does not end the wait for others."""
        results: dict[Any, Any] = {}
        deadline = time.monotonic() + seconds
        waiting = list(refs)
        while waiting:
            ready, waiting = self.wait(waiting, seconds=deadline - time.monotonic())
            if not ready:
                results.update((ref, self.overdue(ref, seconds)) for ref in waiting)
                break
            results.update((ref, self.outcome(ref, what=what)) for ref in ready)
        return [results[ref] for ref in refs]

    def fetch(self, ref: Any) -> Any:
        """What a reference into the object store stands for."""
        import ray

        return ray.get(ref, timeout=self.section.call_seconds)

    def wait(self, refs: Sequence[Any], *, seconds: float, may_stop: bool = False) -> tuple[list[Any], list[Any]]:
        """(finished, unfinished), as soon as one is finished; nothing is finished when the seconds have passed."""
        import ray

        deadline = time.monotonic() + seconds
        waiting = list(refs)
        while True:
            if may_stop:
                self._check_stop()
            left = deadline - time.monotonic()
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=min(POLL_SECONDS, max(left, 0.0)))
            if ready:
                more, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
                return ready + more, waiting
            if left <= 0:
                return [], waiting

    def outcome(self, ref: Any, *, what: str) -> Any:
        """The result of a finished call, or Lost. Raises what our code raised in the actor, and ClusterError for the rest."""
        import ray
        from ray import exceptions

        try:
            return ray.get(ref, timeout=max(CLOSE_SECONDS, self.section.call_seconds))
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, exceptions.RayError) or not isinstance(cause, BaseException):
                raise ClusterError(f"{what}: {cause}") from None
            where = f"in {self._name(ref)}"
            cause.add_note(where if isinstance(cause, ConfigError) else f"{where}:\n{_plain(str(error))}")
            raise cause from None
        except exceptions.GetTimeoutError:
            return self.overdue(ref, self.section.call_seconds)
        except (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
            return self._lost(ref, f"died: {_exit_cause(str(error))}")
        except exceptions.RayError as error:
            raise ClusterError(f"{what}: {error}") from None

    def overdue(self, ref: Any, seconds: float) -> Lost:
        """Lost, for a call that was not answered in time."""
        return self._lost(ref, f"did not answer within {seconds:g} s")

    def _name(self, ref: Any) -> str:
        actor = self._actors.get(ref.task_id().actor_id().hex())
        return actor.name if actor is not None else "an actor that was ended"

    def _lost(self, ref: Any, reason: str) -> Lost:
        self._check_head()
        actor = self._actors.get(ref.task_id().actor_id().hex())
        tail = self._tail(actor) if actor is not None else ""
        return Lost(self._name(ref), f"{reason}\nlast lines of its log:\n{tail}" if tail else reason)

    def _check_head(self) -> None:
        """Raises ClusterError when nobody listens at the head node any more. Ray itself would notice after a minute, and end
        this process without a word."""
        import ray

        address = ray.get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CLOSE_SECONDS / 2).close()
        except OSError as error:
            self._gone = True
            raise ClusterError(
                f"the head node of the cluster at {address} is gone ({error}); resume on another one"
            ) from None

    def _tail(self, actor: _Actor) -> str:
        """The end of its log, from whatever node it was on; empty when it cannot be had."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with contextlib.suppress(ray.exceptions.RayError):
            node, _, files = ray.get(actor.place, timeout=1)
            if node == ray.get_runtime_context().get_node_id():
                return _last_lines(files)
            there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
            reader = ray.remote(_last_lines).options(num_cpus=0, scheduling_strategy=there)
            return str(ray.get(reader.remote(files), timeout=10))
        return ""

    def close(self) -> None:
        """End our actors, give back what was reserved, and end a cluster of our own. Returns within a minute even if it is gone."""
        if self._closed:
            return
        self._closed = True
        if self._gone:
            return
        worker = threading.Thread(target=self._release, name="ttrl-cluster-close", daemon=True)
        worker.start()
        worker.join(CLOSE_SECONDS)
        import ray

        last = threading.Thread(target=ray.shutdown, name="ttrl-ray-shutdown", daemon=True)
        last.start()
        last.join(CLOSE_SECONDS)
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)

    def _release(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            for actor in list(self._actors.values()):
                self.kill(actor.handle)
            for group in self._groups:
                ray.util.remove_placement_group(group)


def _place(_: object) -> tuple[str, int, list[str]]:
    """Runs in the actor: (node id, pid, log files)."""
    import ray
    from ray._private.worker import global_worker

    files = [global_worker.get_out_file_path(), global_worker.get_err_file_path()]
    return ray.get_runtime_context().get_node_id(), os.getpid(), files


def _last_lines(files: Sequence[str]) -> str:
    lines = []
    for file in files:
        with contextlib.suppress(OSError):
            text = Path(file).read_text(encoding="utf-8", errors="replace")
            lines += [line for line in text.splitlines() if line.strip() and not line.startswith(":")][-TAIL_LINES:]
    return "\n".join(lines[-TAIL_LINES:])


def _plain(text: str) -> str:
    """Without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def _exit_cause(message: str) -> str:
    """The part of Ray's message that says how an actor ended, without the lines about its identity."""
    kept = message.partition("Worker exit detail: ")[2] or message.replace("\n\t", "; ").strip()
    return kept.partition(" Some common causes")[0].strip()
