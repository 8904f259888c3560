"""Forced answers: a rollout is stopped at a cut point and asked for its answer, a few times.

    rollouts -> cut points -> distinct prefixes -> requests (prefix + termination, m per prefix) -> answers -> chance per prefix

The chance of a right answer belongs to the prefix, not to the rollout: rollouts that share one share its probes. Prefixes are
compared by their tokens, and seeds are addressed by them, so the plan can be made again at any time from the group alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ttrl.episodes import Splitter, splitter
from ttrl.protocols import Objective
from ttrl.seeds import derive
from ttrl.types import IntArray, Prompt, Request, Rollout, SamplingSpec

if TYPE_CHECKING:
    from ttrl.model.load import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTools:
    """What an objective needs to make requests of its own: token ids, and how and from which seed the run samples."""

    tokenizer: Tokenizer
    spec: SamplingSpec
    seed: int


@runtime_checkable
class ProbingObjective(Protocol):
    """An objective that asks for probes. Their answers reach its `samples` judged, as `Scored.probe_rewards`."""

    base: Objective
    """What it is without probes, which only a model can make: `ttrl check` looks at this one."""

    def take_tools(self, tools: ProbeTools) -> int:
        """Called once where probes are made, before the first. Returns how many tokens a probe may add to a rollout."""
        ...


def equip(objective: Objective, tokenizer: Tokenizer, spec: SamplingSpec, seed: int) -> int:
    """Hand the tools to an objective that wants them. Returns the tokens a probe may add to a rollout, 0 for other objectives."""
    if not isinstance(objective, ProbingObjective):
        return 0
    return objective.take_tools(ProbeTools(tokenizer=tokenizer, spec=spec, seed=seed))


TERMINATION = "\n\nTime is up, so I answer with what I have.\n</think>\n\nThe answer is \\boxed{"
"""For models that think between tags and box their answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """How rollouts are stopped: where, with which words, and how many answers of how many tokens are asked for."""

    split: Splitter
    termination: str
    probes: int
    tokens: int

    @staticmethod
    def of(rule: str, options: Mapping[str, Any], *, termination: str, probes: int, tokens: int) -> Stops:
        """Checked. Raises ValueError."""
        for name, value in (("probes", probes), ("probe_tokens", tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        return Stops(split=splitter(rule, options), termination=termination, probes=probes, tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which prefixes are asked, and who they belong to."""

    prefixes: tuple[IntArray, ...]
    """[P] distinct, in order of first appearance; without the termination tokens."""
    places: tuple[tuple[int, ...], ...]
    """[rollouts][cuts] index into `prefixes`."""

    def chances(self, rewards: npt.NDArray[np.floating]) -> list[npt.NDArray[np.float64]]:
        """[P x m] rewards of the probes -> [rollouts][cuts] mean reward of each prefix."""
        means = np.asarray(rewards, np.float64).reshape(len(self.prefixes), -1).mean(axis=1)
        return [means[list(places)] for places in self.places]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """One rollout whose prefixes were asked and judged."""

    index: int
    """in the group"""
    rollout: Rollout
    cuts: tuple[int, ...]
    places: tuple[int, ...]
    """[cuts] number of the prefix in the plan: its probes are places * m up to (places + 1) * m of the group's"""
    chances: npt.NDArray[np.float64]
    """[cuts] mean reward of the answers forced there"""


class Prober:
    """Makes the requests. `seed` is the run's; a probe's stream depends on it, the weights' version, the prompt and the prefix."""

    def __init__(self, stops: Stops, tokenizer: Tokenizer, spec: SamplingSpec, seed: int) -> None:
        self.stops, self._tokenizer, self._seed = stops, tokenizer, seed
        self._termination = np.asarray(tokenizer.encode(stops.termination, add_special_tokens=False), np.int32)
        self._spec = replace(spec, max_new_tokens=stops.tokens, entropy=False, self_certainty=False)

    @property
    def extra_tokens(self) -> int:
        """What a probe may add to a prefix, termination included."""
        return len(self._termination) + self.stops.tokens

    @property
    def termination(self) -> IntArray:
        """The tokens that force an answer."""
        return self._termination

    def cuts(self, rollout: Rollout) -> tuple[int, ...]:
        """0 (nothing thought yet) and the starts of the later episodes, in tokens; k entries for k episodes."""
        return 0, *self.stops.split(rollout.token_ids, self._decode)

    def _decode(self, token_ids: IntArray) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def plan(self, rollouts: Sequence[Rollout], cuts: Sequence[Sequence[int]]) -> Plan:
        """For `cuts` [rollouts][...] into these rollouts."""
        found: dict[bytes, int] = {}
        prefixes: list[IntArray] = []
        places = []
        for rollout, own in zip(rollouts, cuts, strict=True):
            row = []
            for cut in own:
                prefix = rollout.token_ids[:cut]
                place = found.setdefault(prefix.tobytes(), len(prefixes))
                if place == len(prefixes):
                    prefixes.append(prefix)
                row.append(place)
            places.append(tuple(row))
        return Plan(prefixes=tuple(prefixes), places=tuple(places))

    def requests(self, prompt: Prompt, plan: Plan, version: int) -> list[Request]:
        """m per prefix, prefix after prefix."""
        requests = []
        for place, prefix in enumerate(plan.prefixes):
            name = hashlib.blake2b(prefix.tobytes(), digest_size=8).hexdigest()
            whole = np.concatenate([prefix, self._termination])
            for k in range(self.stops.probes):
                requests.append(
                    Request(
                        prompt=prompt, index=place * self.stops.probes + k, spec=self._spec, prefix=whole,
                        seed=derive(self._seed, "probe", version, prompt.id, name, k),
                    )
                )  # fmt: skip
        return requests
