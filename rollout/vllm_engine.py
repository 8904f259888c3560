"""Sampling with vLLM: continuous batching over all requests of a call, prompts of a group shared through the prefix cache.

Tokens go in and tokens come out. Log-probs and entropies are recorded by `vllm_worker.RecordingSampler`, so they mean what those of
the HF engine mean: after temperature, over the full vocabulary. What differs is rounding: vLLM's batches change from step to step,
so a log-prob may differ in its last bits between two runs, and once in many thousand tokens that changes what is drawn.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttrl.config.schema import ModelSection
from ttrl.errors import EngineError
from ttrl.model.load import DTYPES, load_tokenizer
from ttrl.model.weights import Fingerprint, Intake, Shapes
from ttrl.protocols import StopCheck
from ttrl.rollout.vllm_files import Checkpoint, incomplete, local_folder, stop_ids, write_adapter
from ttrl.rollout.vllm_images import with_pictures
from ttrl.rollout.vllm_start import Options, start
from ttrl.types import AdapterSpec, Finish, FloatArray, Health, IntArray, Request, Rollout, WeightStamp

log = logging.getLogger(__name__)

_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.ABORT}

_BATCH_BYTES = 32 << 20
"""Tensors handed to vLLM in one call: with what waits for the rest of its layer, all that is held beside the weights."""


class VLLMEngine:
    """Owns a vLLM engine in this process. Not thread-safe; one per process."""

    has_weights = True
    contexts_at_once: int | None = None

    def __init__(self, model: ModelSection, check_stop: StopCheck, options: Options) -> None:
        folder = local_folder(model.path)
        self.tokenizer = load_tokenizer(model.path)
        assert self.tokenizer.eos_token_id is not None
        self._eos = sorted({self.tokenizer.eos_token_id, *stop_ids(folder)})
        self._options, self._check_stop = options, check_stop
        self._files, self._dtype = Checkpoint(folder), DTYPES[model.dtype]
        self._vllm = start(folder, model, options)
        self._fused: dict[str, list[str]] = self._call("ttrl_install")
        self.takes_adapters = options.lora_rank is not None
        self._numbers = itertools.count(1)
        self._asleep = False
        self._fingerprint, self._hasher = Fingerprint(), ThreadPoolExecutor(1, "ttrl-fingerprint")
        if options.transfer is None:
            for name, tensor in self._files:
                self._fingerprint.update(name, tensor.to(self._dtype))
        self._stamp = WeightStamp(version=0, fingerprint=self._held())
        self._intake: Intake | None = None
        self._sent: set[str] = set()
        """names that any sync so far contained"""
        self._extra: dict[str, list[str]] = {}
        self._adapter: AdapterSpec | None = None
        self._parts: dict[str, Tensor] = {}
        """the adapter's tensors while they arrive"""
        self._lora: Any = None
        self._lora_folder: Any = None

    @property
    def max_positions(self) -> int | None:
        """Longest prompt plus completion."""
        return int(self._vllm.model_config.max_model_len)

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order; all of them are in flight at once."""
        jobs, shown = [], dict[tuple[str, bytes], Any]()
        for request in requests:
            context = np.concatenate([request.prompt.token_ids, request.prefix])
            self._check_room(len(context), request.spec.max_new_tokens)
            key = (request.prompt.id, request.prefix.tobytes())
            if request.prompt.images and key not in shown:
                shown[key] = with_pictures(self._vllm, request, context.tolist())
            jobs.append((shown.get(key, context.tolist()), self._parameters(request)))
        return [self._rollout(request, output) for request, output in zip(requests, self._run(jobs), strict=True)]

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        spec = request.spec
        own = self._options.seeds == "per_request" and spec.temperature > 0
        return SamplingParams(
            temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k, min_p=spec.min_p,
            max_tokens=spec.max_new_tokens, stop_token_ids=self._eos, seed=request.seed % 2**63 if own else None,
            logprobs=2 if spec.self_certainty else int(spec.entropy), flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def _run(self, jobs: Sequence[tuple[Any, Any]]) -> list[Any]:
        """One finished vLLM output per (token ids or vLLM's input with pictures, parameters), in order.

        What is in flight is dropped when anything raises.
        """
        from vllm.inputs import tokens_input

        if self._intake is not None:
            raise EngineError("the engine holds half of a new set of weights: the sync before this was not completed")
        if self._asleep:
            raise EngineError("the engine has left the accelerator to the trainer; restore it before it is used")
        places = {str(next(self._numbers)): place for place in range(len(jobs))}
        outputs: list[Any] = [None] * len(jobs)
        done = False
        try:
            for key, (given, parameters) in zip(places, jobs, strict=True):
                made = tokens_input(given) if isinstance(given, list) else given
                self._vllm.add_request(key, made, parameters, lora_request=self._lora)
            while self._vllm.has_unfinished_requests():
                self._check_stop()
                for output in self._vllm.step():
                    if output.finished:
                        outputs[places[output.request_id]] = output
            done = True
        except (ValueError, RuntimeError) as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"vLLM failed while sampling: {type(error).__name__}: {error}") from error
        finally:
            if not done:
                self._vllm.abort_request(list(places))
        if any(output is None for output in outputs):
            raise EngineError("vLLM lost a request: it reports nothing unfinished, but not every output came")
        return outputs

    def _rollout(self, request: Request, output: Any) -> Rollout:
        found = output.outputs[0]
        ids = np.asarray(found.token_ids, np.int32)
        # [T, 1 to 3]: the sampled token's log-prob, the entropy, self-certainty (see vllm_worker.RecordingSampler)
        table = np.asarray(found.logprobs.logprobs, np.float32).reshape(len(ids), -1)
        if not np.isfinite(table).all():
            raise EngineError("the model gave log-probs that are not finite: its weights, or its dtype, are broken")
        if found.finish_reason not in _FINISH:
            raise EngineError(f"vLLM ended a rollout for an unknown reason: {found.finish_reason!r}")
        whole = np.concatenate([request.prefix, ids])
        return Rollout(
            prompt_id=request.prompt.id,
            index=request.index,
            token_ids=ids,
            logprobs=table[:, 0].copy(),
            entropy=table[:, 1].copy() if request.spec.entropy else None,
            self_certainty=table[:, 2].copy() if request.spec.self_certainty else None,
            text=self.tokenizer.decode(whole.tolist(), skip_special_tokens=True),
            finish=_FINISH[found.finish_reason],
            weights=self._stamp,
        )

    def score(self, token_ids: IntArray) -> FloatArray:
        """[T] -> [T - 1] log-probs at temperature 1, computed now: vLLM reads no cached prefix when it scores a prompt."""
        from vllm import SamplingParams

        ids = token_ids.tolist()
        if len(ids) < 2:
            return np.zeros(0, np.float32)
        # The last token is asked for by name, so that a text of max_positions tokens fits without one more to sample
        named = SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, logprob_token_ids=ids[-1:], flat_logprobs=True, detokenize=False,
            skip_reading_prefix_cache=True,
        )  # fmt: skip
        output = self._run([(ids[:-1], named)])[0]
        return np.asarray([*output.prompt_logprobs.logprobs, output.outputs[0].logprobs.logprobs[1]], np.float32)

    def _check_room(self, context: int, wanted: int) -> None:
        """Raises EngineError when prompt and completion do not fit; nothing is shortened silently."""
        limit = self.max_positions
        if limit is not None and context + wanted > limit:
            raise EngineError(
                f"{context} context tokens and {wanted} new ones do not fit into an engine of {limit} positions"
            )

    def begin_load(self, version: int, manifest: Shapes, adapter: AdapterSpec | None = None) -> None:
        """Raises EngineError when an adapter comes to an engine built without, or the other way round, or while released."""
        if self._asleep:  # waking up would put the old weights back
            raise EngineError(
                "new weights for an engine that has left the accelerator to the trainer; restore it first"
            )
        rank = self._options.lora_rank
        if (adapter is None) != (rank is None):
            came = "whole weights" if adapter is None else "an adapter"
            raise EngineError(
                f"{came} came to a vLLM engine with lora_rank: {rank}; set it if, and only if, LoRA is trained"
            )
        if adapter is not None and rank is not None and adapter.rank > rank:
            raise EngineError(f"an adapter of rank {adapter.rank} came to a vLLM engine with lora_rank: {rank}")
        extra = incomplete(manifest, self._fused, self._files, self._sent) if adapter is None else {}
        if extra and self._options.transfer is not None:
            raise EngineError(
                f"{next(iter(extra))} is part of a fused layer that is not sent whole, which vLLM's weight transfer cannot "
                "load: set lora_rank, so that the adapter is sent instead, or cluster.transport: object_store"
            )
        self._intake, self._extra = Intake(version, manifest), extra
        self._adapter, self._parts = adapter, {}
        if adapter is None and self._options.transfer is None:
            self._call("ttrl_begin")

    def load(self, tensors: Iterable[tuple[str, Tensor]], *, lasting: bool = False) -> None:
        """Hand on. Raises EngineError for what was not announced and for what vLLM does not take."""
        assert self._intake is not None
        batch: list[tuple[str, Tensor]] = []
        for name, tensor in self._intake.take(iter(tensors)):
            held = tensor.detach().to(self._dtype)
            if not lasting and held.data_ptr() == tensor.data_ptr():  # vLLM keeps it until a layer is complete
                held = held.clone()
            batch.append((name, held))
            # Alone at first, for only then is it seen when vLLM skips it; a call costs milliseconds, so later in batches
            if name not in self._sent or sum(t.nbytes for _, t in batch) > _BATCH_BYTES:
                self._hand_on(batch)
                batch = []
        self._hand_on(batch)
        if lasting and self._adapter is None:
            self._call("ttrl_let_go")

    def _hand_on(self, batch: Sequence[tuple[str, Tensor]]) -> None:
        """To vLLM, or to the adapter that is being collected."""
        hashed = self._hasher.submit(self._hash, batch)  # beside vLLM, which leaves a core free on most machines
        if self._adapter is not None:
            self._parts.update((name, tensor.cpu().contiguous().clone()) for name, tensor in batch)
        elif batch:
            rest = [other for name, _ in batch for other in self._extra.pop(name, ())]
            self._call("ttrl_receive", list(batch))
            if rest:
                self._call("ttrl_receive", [(other, self._files.get(other).to(self._dtype)) for other in rest])
        hashed.result()
        self._sent.update(name for name, _ in batch)

    def _hash(self, batch: Sequence[tuple[str, Tensor]]) -> None:
        for name, tensor in batch:
            self._fingerprint.update(name, tensor)

    def transfer(self, method: str, argument: dict[str, Any] | None = None) -> None:
        """A step of vLLM's own weight transfer, driven by the trainer (see `vllm_transfer`); stands where `load` would stand."""
        if method == "update_weights":
            assert self._intake is not None and argument is not None
            shapes = [torch.empty(shape, device="meta") for shape in argument["shapes"]]
            for name, _ in self._intake.take(zip(argument["names"], shapes, strict=True)):
                self._sent.add(name)
        self._call(method, *(() if argument is None else (argument,)))

    def end_load(self) -> str:
        """Raises EngineError when a tensor did not come; the engine then refuses to generate."""
        assert self._intake is not None
        self._intake.finish()
        if self._adapter is not None:
            self._install(self._adapter, self._intake.version)
        else:
            self._call("ttrl_end", self._options.transfer is None)
        if not self._vllm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache, which holds keys and values of the old weights")
        self._vllm.reset_encoder_cache()  # what the old vision tower saw
        self._stamp = WeightStamp(version=self._intake.version, fingerprint=self._held())
        self._intake = None
        return self._stamp.fingerprint

    def _held(self) -> str:
        """Fingerprint of what arrived; with vLLM's own transfer, which shows us no tensors, of what its workers hold."""
        if self._options.transfer is not None:
            held = self._vllm.collective_rpc("ttrl_digest")
            self._fingerprint.update("held", torch.tensor([number for worker in held for _, number in worker]))
        return self._fingerprint.value()

    def _install(self, adapter: AdapterSpec, version: int) -> None:
        """The adapter that arrived replaces the one before. A new id each time: vLLM caches by id."""
        from vllm.lora.request import LoRARequest

        number, old = next(self._numbers), self._lora
        folder = write_adapter(adapter, self._parts)
        self._parts = {}
        self._lora = LoRARequest(f"version-{version}-{number}", number, folder.name)
        if old is not None:
            self._vllm.remove_lora(old.lora_int_id)
        try:
            accepted = self._vllm.add_lora(self._lora)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"vLLM does not take the adapter: {error}") from error
        if not accepted:
            raise EngineError("vLLM does not take the adapter")
        self._lora_folder = folder  # vLLM reads it again if it ever drops the adapter; the folder before is deleted

    def release(self) -> None:
        """Weights move to host memory and the KV cache is dropped. (Not discarded: a step may train nothing, or adapters only.)"""
        if self._on_cpu():
            log.debug("vLLM on a CPU has no sleep mode: weights and cache stay where they are")
        else:
            self._vllm.sleep(level=1)
        self._asleep = True

    def restore(self) -> None:
        """Undo release. Raises EngineError when vLLM is not awake afterwards."""
        if not self._on_cpu():
            self._vllm.wake_up()
            if self._vllm.is_sleeping():
                raise EngineError("vLLM did not wake up")
        self._asleep = False

    def _on_cpu(self) -> bool:
        return bool(self._vllm.vllm_config.device_config.device_type == "cpu")

    def ping(self) -> Health:
        return Health(ok=True, weights=self._stamp)

    def _call(self, method: str, *arguments: Any) -> Any:
        """A method of `vllm_worker.Worker` in every process of the engine; the first one's answer."""
        return self._vllm.collective_rpc(method, args=arguments)[0]
