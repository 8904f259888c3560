"""An engine without a model: completions come from a given table, at random but by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ttrl.errors import EngineError
from ttrl.seeds import uniforms
from ttrl.types import AdapterSpec, Finish, FloatArray, Health, IntArray, Request, Rollout, WeightStamp

if TYPE_CHECKING:
    from ttrl.model.load import Tokenizer


class Script:
    """Prompt text -> completions and their probabilities. Raises ValueError for probabilities that do not sum to 1."""

    def __init__(self, answers: Mapping[str, Mapping[str, float]]) -> None:
        for prompt, table in answers.items():
            if not table or min(table.values()) < 0 or abs(sum(table.values()) - 1) > 1e-6:
                raise ValueError(
                    f"scripted answers for {prompt!r} need probabilities >= 0 that sum to 1, got {dict(table)}"
                )
        self._answers = answers

    def completion(
        self, prompt: str, uniform: float, fits: Callable[[str], bool] = lambda _: True
    ) -> tuple[str, float]:
        """The completion at this point of the distribution, among those that fit, and its probability among them."""
        if prompt not in self._answers:
            raise EngineError(f"the script has no answers for the prompt {prompt!r}")
        possible = {text: p for text, p in self._answers[prompt].items() if p > 0 and fits(text)}
        if not possible:
            raise EngineError(f"no scripted answer to {prompt!r} begins with the given prefix")
        whole = sum(possible.values())
        total = 0.0
        for text, probability in possible.items():
            total += probability / whole
            if uniform < total:
                return text, probability / whole
        text = next(reversed(possible))
        return text, possible[text] / whole


class ScriptedEngine:
    """Same seeds, same completions, as with a real engine. The log-prob of the whole text stands on its first new token.

    A prefix is continued by the completions that begin with it, in proportion to their probabilities.
    """

    has_weights = False
    takes_adapters = False
    contexts_at_once: int | None = None

    def __init__(self, script: Script, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.max_positions: int | None = None
        self._script = script
        self._stamp = WeightStamp(version=0, fingerprint="scripted")

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        return [self._rollout(request) for request in requests]

    def _rollout(self, request: Request) -> Rollout:
        prefix = request.prefix.tolist()
        text, probability = self._script.completion(
            request.prompt.text, float(uniforms(request.seed, 1)[0]), lambda text: self._continues(prefix, text)
        )
        ids = self._ids(text)[len(prefix) :]
        complete = len(ids) <= request.spec.max_new_tokens
        ids = ids[: request.spec.max_new_tokens]
        logprobs = np.zeros(len(ids), np.float32)
        logprobs[0] = np.log(probability)
        return Rollout(
            prompt_id=request.prompt.id,
            index=request.index,
            token_ids=np.asarray(ids, np.int32),
            logprobs=logprobs,
            entropy=np.zeros(len(ids), np.float32) if request.spec.entropy else None,
            self_certainty=np.zeros(len(ids), np.float32) if request.spec.self_certainty else None,
            text=text if complete else self.tokenizer.decode([*prefix, *ids], skip_special_tokens=True),
            finish=Finish.STOP if complete else Finish.LENGTH,
            weights=self._stamp,
        )

    def _ids(self, text: str) -> list[int]:
        """A whole completion, its end included."""
        assert self.tokenizer.eos_token_id is not None
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]

    def _continues(self, prefix: list[int], text: str) -> bool:
        """Something of the completion is left after the prefix."""
        ids = self._ids(text)
        return len(ids) > len(prefix) and ids[: len(prefix)] == prefix

    def begin_load(
        self, version: int, manifest: Mapping[str, tuple[int, ...]], adapter: AdapterSpec | None = None
    ) -> None:
        """A script does not learn; only the version moves."""
        self._stamp = WeightStamp(version=version, fingerprint="scripted")

    def load(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        """Looked at by nobody, but taken, as a sender expects."""
        for _ in tensors:
            pass

    def end_load(self) -> str:
        return self._stamp.fingerprint

    def score(self, token_ids: IntArray) -> FloatArray:
        """A script has no log-probs of texts."""
        raise EngineError("a scripted engine cannot score text")

    def release(self) -> None:
        """Nothing to free."""

    def restore(self) -> None:
        """Nothing was released."""

    def ping(self) -> Health:
        return Health(ok=True, weights=self._stamp)
