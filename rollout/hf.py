"""Sampling with transformers: the prompt of a group is computed once, and finished rows leave the batch.

Every group is a batch of its own. So the numbers a rollout is drawn from depend on nothing but its group: not on which other
prompts are in the step, not on which worker took it, not on the order. Throughput comes from the votes of the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ttrl.config.schema import ModelSection
from ttrl.errors import ConfigError, EngineError
from ttrl.model.eyes import Seen, open_eyes
from ttrl.model.load import eos_ids, load_model, load_tokenizer
from ttrl.model.prefix import ExpandedPrefix, SharedPrefix, enable_shared_prefix
from ttrl.model.sampling import draw, text_logprobs
from ttrl.model.weights import Fingerprint, Intake, Shapes, load_into
from ttrl.protocols import StopCheck
from ttrl.seeds import uniforms
from ttrl.types import AdapterSpec, Finish, FloatArray, Health, IntArray, Request, Rollout, WeightStamp


class HFEngine:
    """Owns a copy of the model. Not thread-safe; one engine per process or device."""

    has_weights = True
    takes_adapters = False
    contexts_at_once: int | None = 1

    def __init__(self, model: ModelSection, check_stop: StopCheck, *, rows_at_once: int, shared_prefix: bool) -> None:
        self.tokenizer = load_tokenizer(model.path)
        self._model = load_model(model)
        self._eos = torch.tensor(eos_ids(self._model, self.tokenizer), device=self._model.device)
        self._eyes = open_eyes(self._model, model.path)
        self._shared = shared_prefix and enable_shared_prefix(self._model)
        self._rows_at_once = rows_at_once
        self._check_stop = check_stop
        self._device = self._model.device
        self._fingerprint = Fingerprint()
        for name, parameter in self._parameters().items():
            self._fingerprint.update(name, parameter)
        self._stamp = WeightStamp(version=0, fingerprint=self._fingerprint.value())
        self._intake: Intake | None = None

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order. Neighbours with one context and spec form a batch."""
        if self._intake is not None:
            raise EngineError("the engine holds half of a new set of weights: the sync before this was not completed")
        rollouts: list[Rollout] = []
        for _, batch in groupby(requests, key=lambda r: (r.prompt.id, r.prefix.tobytes(), r.spec)):
            group = list(batch)
            for start in range(0, len(group), self._rows_at_once):
                self._check_stop()
                rollouts += self._batch(group[start : start + self._rows_at_once])
        return rollouts

    def _batch(self, requests: Sequence[Request]) -> list[Rollout]:
        """Decode one context for R requests; arrays [R, max_new_tokens] are filled column by column."""
        first, spec = requests[0], requests[0].spec
        context = np.concatenate([first.prompt.token_ids, first.prefix])
        limit = spec.max_new_tokens
        self._check_room(len(context), limit)
        noise = np.stack([uniforms(r.seed, len(r.prefix) + limit)[len(r.prefix) :] for r in requests])
        uniform = torch.from_numpy(noise).to(self._device)
        prefix = SharedPrefix(self._model) if self._shared else ExpandedPrefix(self._model)
        logits = prefix.prefill(self._taken_in(first, context), logits_to_keep=1).logits[:, -1]
        logits = logits.expand(len(requests), -1)

        tokens = torch.zeros((len(requests), limit), dtype=torch.long, device=self._device)
        logprobs = torch.zeros((len(requests), limit), device=self._device)
        entropy = torch.zeros((len(requests), limit), device=self._device) if spec.entropy else None
        certainty = torch.zeros((len(requests), limit), device=self._device) if spec.self_certainty else None
        lengths = torch.full((len(requests),), limit, device=self._device)
        active = torch.arange(len(requests), device=self._device)
        for t in range(limit):
            drawn = draw(logits, uniform[active, t], spec)
            tokens[active, t], logprobs[active, t] = drawn.tokens, drawn.logprobs
            if entropy is not None and drawn.entropy is not None:
                entropy[active, t] = drawn.entropy
            if certainty is not None and drawn.self_certainty is not None:
                certainty[active, t] = drawn.self_certainty
            going = torch.isin(drawn.tokens, self._eos, invert=True)
            lengths[active[~going]] = t + 1
            if t + 1 == limit or not bool(going.any()):
                break
            if not bool(going.all()):
                rows = going.nonzero()[:, 0]
                active = active[rows]
                if t > 0:
                    prefix.keep(rows)
            logits = prefix.step(tokens[active, t])
        return self._rollouts(
            requests, tokens.cpu(), logprobs.cpu(), None if entropy is None else entropy.cpu(), lengths.cpu(),
            None if certainty is None else certainty.cpu(),
        )  # fmt: skip

    def _taken_in(self, request: Request, context: IntArray) -> Tensor | Seen:
        """The context as the model gets it. Raises ConfigError for pictures that this model does not take."""
        if not request.prompt.images:
            return torch.as_tensor(context, dtype=torch.long, device=self._device)
        if self._eyes is None:
            raise ConfigError(f"prompt {request.prompt.id!r} has images, but the model is one of text only")
        return self._eyes.see(context, request.prompt.images, len(request.prompt.token_ids))

    def _rollouts(
        self, requests: Sequence[Request], tokens: Tensor, logprobs: Tensor, entropy: Tensor | None, lengths: Tensor,
        certainty: Tensor | None,
    ) -> list[Rollout]:  # fmt: skip
        if not bool(torch.isfinite(logprobs).all()):
            raise EngineError("the model gave log-probs that are not finite: its weights, or its dtype, are broken")
        eos = set(self._eos.tolist())
        rollouts = []
        for row, request in enumerate(requests):
            length = int(lengths[row])
            ids = tokens[row, :length].numpy().astype(np.int32)
            whole = np.concatenate([request.prefix, ids])
            rollouts.append(
                Rollout(
                    prompt_id=request.prompt.id,
                    index=request.index,
                    token_ids=ids,
                    logprobs=logprobs[row, :length].numpy().astype(np.float32),
                    entropy=None if entropy is None else entropy[row, :length].numpy().astype(np.float32),
                    self_certainty=None if certainty is None else certainty[row, :length].numpy().astype(np.float32),
                    text=self.tokenizer.decode(whole.tolist(), skip_special_tokens=True),
                    finish=Finish.STOP if length and int(ids[-1]) in eos else Finish.LENGTH,
                    weights=self._stamp,
                )
            )
        return rollouts

    @property
    def max_positions(self) -> int | None:
        """Longest prompt plus completion, if the model has a limit."""
        found: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return found

    def _check_room(self, context: int, wanted: int) -> None:
        """Raises EngineError when prompt and completion do not fit; nothing is shortened silently."""
        if self.max_positions is not None and context + wanted > self.max_positions:
            raise EngineError(
                f"{context} context tokens and {wanted} new ones do not fit into a model of {self.max_positions} positions"
            )

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self._model.named_parameters()}

    def begin_load(self, version: int, manifest: Shapes, adapter: AdapterSpec | None = None) -> None:
        """Adapters are not taken: they arrive merged."""
        assert adapter is None
        self._intake = Intake(version, manifest)

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, lasting: bool = False) -> None:
        """Copy in place. Raises EngineError for unknown names or shapes."""
        assert self._intake is not None
        load_into(self._parameters(), self._intake.take(iter(tensors)), self._fingerprint)

    def end_load(self) -> str:
        """Raises EngineError when a tensor did not come; the engine then refuses to generate."""
        assert self._intake is not None
        self._intake.finish()
        self._stamp = WeightStamp(version=self._intake.version, fingerprint=self._fingerprint.value())
        self._intake = None
        return self._stamp.fingerprint

    @torch.inference_mode()
    def score(self, token_ids: IntArray) -> FloatArray:
        """[T] -> [T - 1] log-probs at temperature 1."""
        return text_logprobs(self._model, token_ids)

    def release(self) -> None:
        """Nothing to free between phases: the cache of a batch dies with the batch."""

    def restore(self) -> None:
        """Nothing was released."""

    def ping(self) -> Health:
        return Health(ok=True, weights=self._stamp)
