"""The tree sampler: rollouts fork where the model was least certain, and the branches share what came before.

Entropy-fork tree majority rollout (ETMR of ETTRL, arXiv 2508.11356): M trees per prompt, each begun by one whole rollout; forks at
the N tokens of highest entropy; B continuations per fork; every leaf votes. A token before a fork is sampled once for all
branches behind it, so V leaves cost about (1 + N B / 2) / (1 + N B) of the tokens of V independent rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ttrl.errors import EngineError
from ttrl.protocols import Classify, Pool
from ttrl.rollout.flat import trained_subset, vote_requests
from ttrl.seeds import derive
from ttrl.types import Finish, FloatArray, Fork, Group, IntArray, Prompt, Request, Rollout, SamplingSpec, tree_roots


class TreeSampler:
    """`trees` * (1 + `rounds` * `forks` * `branches`) leaves per prompt, which must be `votes_per_prompt`.

    Leaf i has the random stream of vote i of the flat sampler: the trunks are its first votes, token for token. The token at a
    fork is drawn anew, not forced to differ, so every leaf is a draw from the policy. In each round a tree forks at the `forks`
    tokens of highest entropy, `min_gap` apart; the first round is the published method, later ones (ours) choose among the
    tokens of all its leaves. A tree that has too few places is completed by independent rollouts, so the number of votes holds.

    All leaves vote; `trained` of them, drawn by seed, may be trained on. Votes within a tree are correlated: see `tree_votes` of
    the rewards. It does not look at answers: stopping rules that count independent votes have no place here.
    """

    def __init__(
        self, votes: int, trained: int, classify: Classify, *, trees: int, forks: int, branches: int, rounds: int = 1,
        min_gap: int = 8,
    ) -> None:  # fmt: skip
        for name, value in [("trees", trees), ("forks", forks), ("branches", branches), ("rounds", rounds),
                            ("min_gap", min_gap)]:  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        leaves = trees * (1 + rounds * forks * branches)
        if leaves != votes:
            raise ValueError(
                f"rollout.votes_per_prompt is {votes}, but trees * (1 + rounds * forks * branches) = "
                f"{trees} * (1 + {rounds} * {forks} * {branches}) = {leaves} leaves vote; set votes_per_prompt: {leaves}"
            )
        self._votes, self._trained = votes, trained
        self._trees, self._forks, self._branches, self._rounds, self._gap = trees, forks, branches, rounds, min_gap

    def __call__(self, prompts: Sequence[Prompt], pool: Pool, spec: SamplingSpec, seed: int) -> list[Group]:
        spec = replace(spec, entropy=True)
        trunks = pool.generate([r for p in prompts for r in vote_requests(p, spec, seed, 0, self._trees)])
        grown = {p.id: trunks[i * self._trees : (i + 1) * self._trees] for i, p in enumerate(prompts)}
        for _ in range(self._rounds):
            places = {p.id: self.places(grown[p.id]) for p in prompts}
            new = iter(pool.generate([r for p in prompts for r in _requests(p, spec, seed, grown[p.id], places[p.id])]))
            for p in prompts:
                leaves = grown[p.id]
                leaves += [_joined(leaves, fork, next(new)) for fork in places[p.id]]
        return [
            Group(
                prompt=prompt,
                rollouts=tuple(grown[prompt.id]),
                trainable=trained_subset(seed, prompt.id, self._votes, self._trained, drawn=self._votes),
            )
            for prompt in prompts
        ]

    def places(self, rollouts: Sequence[Rollout]) -> list[Fork | None]:
        """Where the leaves of the next round begin, in the order of their indices; None: at the prompt, as a tree of its own."""
        roots = tree_roots(rollouts)
        found: list[Fork | None] = []
        for tree in range(self._trees):
            points = fork_points(
                [r for r, root in zip(rollouts, roots, strict=True) if root == tree], self._forks, self._gap
            )
            found += [point for point in points for _ in range(self._branches)]
            found += [None] * ((self._forks - len(points)) * self._branches)
        return found


def fork_points(tree: Sequence[Rollout], count: int, min_gap: int) -> list[Fork]:
    """At most `count` places where the leaves of one tree fork next: highest entropy first, then ordered by leaf and place.

    A place is a token that its leaf drew itself, the first one of the prompt excepted (a fork there would share nothing), and never
    the token that ended it. On one leaf, places are `min_gap` apart, counting those of earlier rounds and the leaf's own fork. Of
    equal entropies the earlier leaf and place wins. Raises EngineError when entropies were not recorded.
    Golden: entropies .1 .9 .2 .8 .3 of one leaf, cut at its limit, count 2 -> at 1 and 3.
    """
    parts = [_candidates(leaf, min_gap) for leaf in tree]
    entropies, owners, places = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    taken = [leaf.fork for leaf in tree if leaf.fork is not None]
    chosen: list[Fork] = []
    for i in np.lexsort((places, owners, -entropies)):
        if len(chosen) == count:
            break
        point = Fork(parent=int(owners[i]), at=int(places[i]))
        if not any(f.parent == point.parent and abs(f.at - point.at) < min_gap for f in [*taken, *chosen]):
            chosen.append(point)
    return sorted(chosen, key=lambda fork: (fork.parent, fork.at))


def _candidates(leaf: Rollout, min_gap: int) -> tuple[FloatArray, IntArray, IntArray]:
    """Entropy, owner and place of each token at which a leaf may fork."""
    if leaf.entropy is None:
        raise EngineError("the engine recorded no entropies, which the tree sampler needs to find its forks")
    first = 1 if leaf.fork is None else leaf.fork.at + min_gap
    last = len(leaf.token_ids) - (leaf.finish is Finish.STOP)
    places = np.arange(first, max(first, last), dtype=np.int32)
    return leaf.entropy[places], np.full(len(places), leaf.index, np.int32), places


def _requests(
    prompt: Prompt, spec: SamplingSpec, seed: int, leaves: Sequence[Rollout], places: Sequence[Fork | None]
) -> list[Request]:
    """The next leaves of a prompt. Those of one fork stand together, so that engines share their context."""
    return [
        Request(
            prompt=prompt, index=index, seed=derive(seed, prompt.id, index),
            spec=spec if fork is None else replace(spec, max_new_tokens=spec.max_new_tokens - fork.at),
            prefix=np.zeros(0, np.int32) if fork is None else leaves[fork.parent].token_ids[: fork.at],
        )
        for index, fork in enumerate(places, start=len(leaves))
    ]  # fmt: skip


def _joined(leaves: Sequence[Rollout], fork: Fork | None, rest: Rollout) -> Rollout:
    """The whole of a leaf: what it shares with its parent, with the numbers the same weights gave there, and what it drew itself."""
    if fork is None:
        return rest
    parent = leaves[fork.parent]
    return replace(
        rest, fork=fork,
        token_ids=np.concatenate([parent.token_ids[: fork.at], rest.token_ids]),
        logprobs=np.concatenate([parent.logprobs[: fork.at], rest.logprobs]),
        entropy=_both(parent.entropy, rest.entropy, fork.at),
        self_certainty=_both(parent.self_certainty, rest.self_certainty, fork.at),
    )  # fmt: skip


def _both(shared: FloatArray | None, own: FloatArray | None, at: int) -> FloatArray | None:
    return None if shared is None or own is None else np.concatenate([shared[:at], own])
