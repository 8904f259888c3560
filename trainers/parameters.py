"""What is trained: all parameters, or low-rank adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from ttrl.errors import ConfigError
from ttrl.types import AdapterSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Gather = Callable[[Sequence[Any]], AbstractContextManager[Any]]
"""A context in which these parameters are whole: trivial in one process, a collective under ZeRO-3."""


def whole(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """The Gather of parameters that are never split."""
    return nullcontext()


class Parameters(Protocol):
    """Chooses the trained tensors of a model and translates them back to the model's own names."""

    def attach(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        """Prepare the model in place; returns the trained parameters by name."""
        ...

    def manifest(self, model: PreTrainedModel, *, adapter: bool = False) -> dict[str, tuple[int, ...]]:
        """Name and full shape of everything `moved` must yield."""
        ...

    def moved(
        self, model: PreTrainedModel, gather: Gather = whole, *, adapter: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Full tensors that training may have changed, under the names of the untouched model, one at a time.

        A tensor is only borrowed until the next one. With `adapter`, the tensors of the adapter alone, under peft's names.
        """
        ...

    def adapter(self) -> AdapterSpec | None:
        """The adapter that is trained, if that is what is trained."""
        ...

    def start(self) -> AbstractContextManager[None] | None:
        """A context in which the model is the start model, or None when a frozen copy is needed."""
        ...


class Full:
    """Every parameter. The KL anchor then needs a second, frozen copy of the model."""

    def attach(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        model.requires_grad_(True)
        return dict(model.named_parameters())

    def manifest(self, model: PreTrainedModel, *, adapter: bool = False) -> dict[str, tuple[int, ...]]:
        return {name: full_shape(parameter) for name, parameter in model.named_parameters()}

    def moved(
        self, model: PreTrainedModel, gather: Gather = whole, *, adapter: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            with gather([parameter]):
                yield name, parameter.detach()

    def adapter(self) -> AdapterSpec | None:
        return None

    def start(self) -> AbstractContextManager[None] | None:
        return None


class LoRA:
    """Low-rank adapters through peft (arXiv 2106.09685). The start model is the same model with the adapters switched off.

    Of a vision-language model the language model is adapted; `vision: true` looks for `targets` in the vision tower and the projector
    too.
    """

    def __init__(
        self, *, rank: int = 16, alpha: float = 32.0, targets: list[str] | str = "all-linear", vision: bool = False
    ) -> None:
        if rank < 1 or alpha <= 0:
            raise ValueError(f"lora needs rank >= 1 and alpha > 0, got rank={rank}, alpha={alpha}")
        self._rank, self._alpha, self._targets, self._vision = rank, alpha, targets, vision
        self._peft: Any = None
        self._layers: list[str] = []

    def attach(self, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
        import torch
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        plain = {name for name, _ in model.named_parameters()}
        config = LoraConfig(
            r=self._rank,
            lora_alpha=self._alpha,
            target_modules=self._targets,
            exclude_modules=None if self._vision else _outside_decoder(model),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)  # the adapters start from random numbers; the seed is the run's
            try:
                self._peft = get_peft_model(model, config)
            except ValueError as error:
                raise ConfigError(
                    f"trainer.parameters lora: targets {self._targets!r} do not fit this model: {error}"
                ) from error
        # A tensor that is tied to another has no name of its own, so an engine could not be sent the adapted one
        tied = [n for n, m in model.named_modules() if isinstance(m, LoraLayer) and f"{n}.weight" not in plain]
        if tied:
            raise ConfigError(
                f"trainer.parameters lora: {', '.join(tied)} shares its weights and cannot be adapted alone"
            )
        self._layers = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def manifest(self, model: PreTrainedModel, *, adapter: bool = False) -> dict[str, tuple[int, ...]]:
        if adapter:
            return {
                f"{_PEFT}{name.replace('.default', '')}": full_shape(parameter)
                for name, parameter in model.named_parameters()
                if _is_adapter(name)
            }
        layers = {name.rpartition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
        bases = {name: full_shape(p) for name, p in model.named_parameters() if name.endswith(".base_layer.weight")}
        return {f"{layer}.weight": bases[f"{layer}.base_layer.weight"] for layer in sorted(layers)}

    def moved(
        self, model: PreTrainedModel, gather: Gather = whole, *, adapter: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        return self._adapters(model, gather) if adapter else self._merged(model, gather)

    def _merged(self, model: PreTrainedModel, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        import torch
        from peft.tuners.lora import LoraLayer

        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                with gather(list(module.parameters())), torch.no_grad():
                    yield f"{name}.weight", module.base_layer.weight + module.get_delta_weight("default")

    def _adapters(self, model: PreTrainedModel, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if _is_adapter(name):
                with gather([parameter]):
                    yield f"{_PEFT}{name.replace('.default', '')}", parameter.detach()

    def adapter(self) -> AdapterSpec | None:
        assert self._peft is not None
        return AdapterSpec(rank=self._rank, alpha=self._alpha, targets=tuple(self._layers))

    def start(self) -> AbstractContextManager[None] | None:
        assert self._peft is not None
        return self._peft.disable_adapter()  # type: ignore[no-any-return]


def _outside_decoder(model: PreTrainedModel) -> str | None:
    """A pattern of the modules that are not part of the language model; None for a model of text."""
    if getattr(model.config, "vision_config", None) is None:
        return None
    decoder = model.get_decoder()
    inside = {id(module) for module in (*decoder.modules(), model.get_output_embeddings())}
    outside = [
        re.escape(name)
        for name, module in model.named_modules()
        if id(module) not in inside and not any(module.children())
    ]
    return "|".join(outside)


_PEFT = "base_model.model."
"""What peft puts before the model's own names when it saves an adapter."""


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape before ZeRO-3 split the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
