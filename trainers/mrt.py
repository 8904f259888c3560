"""MRT (arXiv 2503.07572): GRPO plus a reward for progress, measured by answers forced at cut points of the rollout.

    A_t = outcome * A_grpo + alpha * progress_t

`form: scalar` draws one cut c per rollout; tokens after it get R - J(c), tokens before it 0. J(c) is the mean reward of answers
forced there: the rollout is compared with stopping instead of with the other rollouts. `form: episodes` forces answers at every
cut; the tokens of episode j get J_{j+1} - J_j, which sums to R - J_0. The answers come from the weights that sampled the rollouts,
never from newer ones, so making an early prefix worse earns nothing.

R and J speak of one thing: a probe is right when the reward's own reader finds the group's label in it. So the signal is label-free
with `majority_vote` and uses references only with `gold` (which needs allow_labels). Without a label there is no progress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ttrl.config.schema import Plug
from ttrl.errors import PluginError
from ttrl.metrics import MetricSet
from ttrl.objectives import Decoder
from ttrl.probing import TERMINATION, Probed, Prober, ProbeTools, Stops
from ttrl.protocols import ForwardOut, LossOut, TensorBatch
from ttrl.seeds import derive, generator
from ttrl.trainers.aggregate import Aggregate
from ttrl.trainers.grpo import GRPO, PPO_CLIP
from ttrl.trainers.progress import beyond_termination, on_tokens, progress
from ttrl.types import Group, Request, Rollout, Sample, Scored


class MRT:
    """`outcome: 0, alpha: 1` is the bare R - R_termination; `alpha: 0` is GRPO bit for bit and makes no probes.

    Splitter, its options, `termination`, `probes` (m per prefix) and `probe_tokens`: see `ttrl.episodes` and `ttrl.probing`.
    `progress_clip` bounds each progress term. `advantage`, `loss`, `clip`, ... are those of `grpo`.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        outcome: float = 1.0,
        form: Literal["scalar", "episodes"] = "scalar",
        splitter: Literal["paragraphs", "delimiter", "tokens"] = "paragraphs",
        splitter_options: dict[str, Any] | None = None,
        termination: str = TERMINATION,
        probes: int = 8,
        probe_tokens: int = 32,
        progress_clip: float = 1.0,
        advantage: Plug | str = "grpo",
        shape: tuple[Plug | str, ...] = (),
        loss: Plug | str = "clip",
        regularizers: tuple[Plug | str, ...] = (),
        aggregate: Aggregate | None = None,
        fixed_length: int | None = None,
        clip: tuple[float, float] = PPO_CLIP,
        dual_clip: float | None = None,
        tis: dict[str, Any] | None = None,
    ) -> None:
        if alpha < 0 or outcome < 0 or alpha + outcome == 0:
            raise ValueError(f"alpha and outcome are weights >= 0, not both 0; got {alpha} and {outcome}")
        if not 0 < progress_clip <= 1:
            raise ValueError(f"progress_clip must be above 0 and at most 1, got {progress_clip}")
        self.base = GRPO(
            advantage=advantage, shape=shape, loss=loss, regularizers=regularizers, aggregate=aggregate, fixed_length=fixed_length,
            clip=clip, dual_clip=dual_clip, tis=tis,
        )  # fmt: skip
        self.needs: frozenset[str] = self.base.needs
        self._alpha, self._outcome, self._form, self._clip = alpha, outcome, form, progress_clip
        self._stops = Stops.of(
            splitter, splitter_options or {}, termination=termination, probes=probes, tokens=probe_tokens
        )
        self._prober: Prober | None = None
        self._seed = 0

    def take_tools(self, tools: ProbeTools) -> int:
        """Called once, when there is a tokenizer. Returns the tokens a probe may add to a rollout."""
        self._prober = Prober(self._stops, tools.tokenizer, tools.spec, tools.seed)
        self._seed = tools.seed
        return self._prober.extra_tokens if self._alpha else 0

    def probes(self, group: Group) -> list[Request]:
        """Forced answers for the rollouts that may be trained on."""
        rollouts = [group.rollouts[int(i)] for i in np.flatnonzero(group.trainable)]
        if self._alpha == 0 or not rollouts:
            return []
        version = rollouts[0].weights.version
        return self.prober.requests(group.prompt, self.prober.plan(rollouts, self._cuts(rollouts)), version)

    def samples(self, scored: Scored) -> list[Sample]:
        """Those of GRPO, their advantages weighed and progress added. Raises as `probed`."""
        samples = self.base.samples(scored)
        if (self._alpha == 0 and self._outcome == 1) or not samples:
            return samples
        bonus = {}
        if self._alpha and scored.label is not None:
            bonus = {p.index: self._bonus(p, float(scored.rewards[p.index])) for p in self.probed(scored)}
        return [
            replace(
                sample,
                advantages=(self._outcome * sample.advantages + self._alpha * bonus.get(int(i), 0.0)).astype(
                    np.float32
                ),
            )
            for i, sample in zip(np.flatnonzero(scored.train), samples, strict=True)
        ]

    def finish(self, samples: list[Sample], step: int) -> tuple[list[Sample], MetricSet]:
        """What GRPO does to the whole step, progress included."""
        return self.base.finish(samples, step)

    def denominator(self, samples: Sequence[Sample]) -> float:
        """As GRPO's."""
        return self.base.denominator(samples)

    def loss(self, out: ForwardOut, batch: TensorBatch) -> LossOut:
        """The policy term of GRPO and its regularizers."""
        return self.base.loss(out, batch)

    def take_tokenizer(self, tokenizer: Decoder) -> None:
        """For shapers that find text among tokens."""
        self.base.take_tokenizer(tokenizer)

    def state(self) -> Mapping[str, Any]:
        """What shapers and regularizers remember."""
        return self.base.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue as the objective of the same recipe that returned `state`."""
        self.base.load_state(state)

    def probed(self, scored: Scored) -> list[Probed]:
        """The rollouts that may be trained on, with the chance of a right answer at each of their cuts.

        Raises PluginError when the probes of the group were not judged: progress must not be lost silently.
        """
        asked = [int(i) for i in np.flatnonzero(scored.group.trainable)]
        rollouts = [scored.group.rollouts[i] for i in asked]
        cuts = self._cuts(rollouts)
        plan = self.prober.plan(rollouts, cuts)
        wanted = len(plan.prefixes) * self._stops.probes
        if scored.probe_rewards is None or len(scored.probe_rewards) != wanted:
            found = 0 if scored.probe_rewards is None else len(scored.probe_rewards)
            raise PluginError(f"mrt asked for {wanted} probes, but {found} were judged")
        return [
            Probed(index=i, rollout=rollout, cuts=own, places=places, chances=chances)
            for i, rollout, own, places, chances in zip(
                asked, rollouts, cuts, plan.places, plan.chances(scored.probe_rewards), strict=True
            )
        ]

    def _bonus(self, probed: Probed, reward: float) -> npt.NDArray[np.float64]:
        """[T] progress on the tokens of one rollout."""
        whole = self._form == "episodes"
        terms = progress([*probed.chances, reward]) if whole else beyond_termination([reward], probed.chances)
        return on_tokens(np.clip(terms, -self._clip, self._clip), probed.cuts, len(probed.rollout.token_ids))

    def _cuts(self, rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
        """All cuts of each rollout, or one of them, drawn by seed: every episode boundary is equally likely."""
        every = [self.prober.cuts(rollout) for rollout in rollouts]
        if self._form == "episodes":
            return every
        picked: list[tuple[int, ...]] = []
        for rollout, cuts in zip(rollouts, every, strict=True):
            seed = derive(self._seed, "cut", rollout.weights.version, rollout.prompt_id, rollout.index)
            picked.append((cuts[int(generator(seed).integers(len(cuts)))],))
        return picked

    @property
    def prober(self) -> Prober:
        """What makes the probes, once there is a tokenizer."""
        assert self._prober is not None, "take_tools must be called before probes are asked for"
        return self._prober
