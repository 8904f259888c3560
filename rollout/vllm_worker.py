"""What ttrl adds to vLLM's workers: a sampler that records exact numbers, and tensor-by-tensor loading of new weights.

vLLM adds the methods of `Worker` to its own worker class (its option `worker_extension_cls`) and calls them by name in every
process of the engine. This module is imported by vLLM only; importing it imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from ttrl.errors import EngineError
from ttrl.model.sampling import self_certainty

_CHUNK = 1 << 24
"""Numbers that `ttrl_digest` widens at once."""


class RecordingSampler(Sampler):  # type: ignore[misc]
    """vLLM's sampler, recording log-probs after temperature over the full vocabulary, whatever top-k, top-p and min-p exclude.

    vLLM itself offers log-probs before temperature, or after the truncation. A request that asks for more log-probs beside the
    sampled token's is given numbers of the distribution instead, in nats: column 1 is its entropy, column 2 its self-certainty.
    """

    def __init__(self, use_fp64_gumbel: bool) -> None:
        super().__init__("raw_logprobs", use_fp64_gumbel)  # the part that truncates need not record anything
        self.logprobs_mode = "processed_logprobs"

    def sample(self, logits: Tensor, sampling_metadata: Any, logprobs_mode_override: Any = None) -> tuple[Tensor, Any]:
        """logits [B, V] -> tokens [B] and, when any request wants log-probs, the table [B, V] they are taken from."""
        meta, table = sampling_metadata, None
        if meta.max_num_logprobs is not None or meta.logprob_token_ids:
            scaled = logits
            if not meta.all_greedy:  # temperature 0 is greedy, and recorded at temperature 1
                heat = torch.where(meta.temperature < 1e-5, 1.0, meta.temperature)
                scaled = logits / heat[:, None]
            table = self.compute_logprobs(scaled)
        return super().sample(logits, meta, "raw_logprobs")[0], table

    @staticmethod
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """[B, V] -> columns: the sampled token; from num_logprobs 1 the entropy; with 2 self-certainty. Ranks are not computed."""
        if num_logprobs not in (0, 1, 2):
            raise EngineError(f"{num_logprobs} more log-probs per token were asked for; ttrl's sampler gives 0 to 2")
        ids = token_ids[:, None]
        columns = [logprobs.gather(1, ids)]
        if num_logprobs >= 1:
            columns.append(-(logprobs.exp() * logprobs.clamp_min(-1e4)).sum(dim=1, keepdim=True))
        if num_logprobs == 2:
            columns.append(self_certainty(logprobs)[:, None])
        values = torch.cat(columns, dim=1)
        return LogprobsTensors(ids.expand_as(values).to(torch.int32), values, torch.zeros_like(token_ids))

    def gather_specific_token_logprobs(
        self, logprobs: Tensor, logprob_token_ids: dict[int, list[int]], sampled: Tensor
    ) -> LogprobsTensors:
        """[B, V] -> columns: the sampled token and the one token each request named."""
        named = torch.tensor([logprob_token_ids[row][0] for row in range(len(sampled))], device=sampled.device)
        ids = torch.stack([sampled, named], dim=1)
        return LogprobsTensors(ids.to(torch.int32), logprobs.gather(1, ids), torch.zeros_like(sampled))


class Worker:
    """Added to vLLM's worker, hence the prefix; `self` is that worker."""

    model_runner: Any
    vllm_config: Any
    _ttrl_layers: list[Any]

    def ttrl_install(self) -> dict[str, list[str]]:
        """Puts the sampler in place; returns vLLM's fused layers, such as qkv_proj -> [q_proj, k_proj, v_proj]."""
        found: Any = getattr(self.model_runner, "sampler", None)
        if type(found) is not Sampler:
            raise EngineError(
                f"this vLLM samples with {type(found).__name__}, which ttrl cannot extend; 0.32 is supported"
            )
        self.model_runner.sampler = RecordingSampler(found.use_fp64_gumbel)
        return dict(getattr(self.model_runner.get_model(), "packed_modules_mapping", None) or {})

    def ttrl_begin(self) -> None:
        """New weights follow. CPU weights are repacked after loading, so they go through vLLM's layerwise reload."""
        model = self.model_runner.get_model()
        self._ttrl_layers = [get_layerwise_info(layer) for layer in model.modules()]
        for info in self._ttrl_layers:
            if info.can_load():  # left over from a sync that was not completed
                info.loaded_weights.clear()
                info.load_numel = 0
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def ttrl_receive(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Full tensors under their names in the checkpoint, which vLLM keeps until the layers they belong to are complete.

        Raises EngineError when vLLM does not know one. That it skips one is seen, and raised, when it comes alone.
        """
        names = ", ".join(name for name, _ in tensors[:3])
        with set_current_vllm_config(self.vllm_config), disable_mtp_completeness_check():
            try:
                loaded = self.model_runner.get_model().load_weights(tensors)
            except (ValueError, KeyError) as error:
                raise EngineError(f"weights for {names!r} arrived, but vLLM has no such parameter: {error}") from error
        if loaded is not None and not loaded:
            raise EngineError(f"weights for {names!r} arrived, but vLLM skipped them")

    def ttrl_let_go(self) -> None:
        """Copies what vLLM keeps of layers that are not complete: it was lent."""
        for info in self._ttrl_layers:
            for _, bound in info.loaded_weights:
                for name, value in bound.arguments.items():
                    if isinstance(value, Tensor) and not value.is_meta:
                        bound.arguments[name] = value.clone()

    def ttrl_end(self, finalize: bool) -> None:
        """Everything came: put the layers back into use. Without `finalize`, vLLM's own weight transfer has done that."""
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            if finalize:
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            _repack_tied(model)

    def ttrl_digest(self) -> list[tuple[str, int]]:
        """A number per parameter that depends on every bit of it; computed where the weights are."""
        return [(name, _digest(parameter)) for name, parameter in self.model_runner.get_model().named_parameters()]


def _repack_tied(model: torch.nn.Module) -> None:
    """A head tied to the embedding keeps a packed copy on a CPU, which vLLM's reload leaves as it was. The embedding has a new one of
    the same weights, so both use that."""
    owners: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        weight, method = module._parameters.get("weight"), getattr(module, "quant_method", None)
        if weight is None or method is None:
            continue
        owner = owners.setdefault(id(weight), module)
        if owner is module:
            continue
        packed = vars(owner).get("cpu_linear")
        if packed is not None and type(owner.quant_method) is type(method):
            module.cpu_linear = packed
        else:
            vars(module).pop("_already_called_process_weights_after_loading", None)
            method.process_weights_after_loading(module)


def _digest(tensor: Tensor) -> int:
    """Sum of bit patterns times position-dependent odd numbers, modulo 2^64."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        position = torch.arange(start, start + len(part), device=bits.device)
        total = total + ((part + 1) * ((position * 0x9E3779B97F4A7C1 + 0x632BE5AB) | 1)).sum()
    return int(total)
