"""How stabilizers see the weights inside DeepSpeed's optimizers: whole parameters without ZeRO, slices of them with stages 1 and 2.

What the optimizer moves is float32 in every case. After writing to it, `publish` brings it into the model, on every rank.
Stage 3 splits each parameter over the ranks in a layout of its own; there only terms of the loss are allowed (`stabilizers.check`).
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ttrl.hooks import Part
from ttrl.trainers.around import Access, NoParts, WholeParts
from ttrl.trainers.dsstate import publish


def access(engine: Any, trained: dict[str, Tensor]) -> Access:
    """The Access that fits the engine's stage."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return SlicedParts(engine, trained)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        low = [p for group in optimizer.fp16_groups for p in group]
        high = [p for group in optimizer.fp32_groups for p in group]
        place = {id(parameter): i for i, parameter in enumerate(low)}
        masters = {name: high[place[id(parameter)]] for name, parameter in trained.items()}
        return WholeParts(trained, engine.basic_optimizer, masters, lambda: publish(engine))
    if optimizer is engine.basic_optimizer:
        return WholeParts(trained, optimizer)
    return NoParts()


class SlicedParts:
    """Stages 1 and 2: this rank holds one flat slice of all parameters, and of the moments."""

    def __init__(self, engine: Any, trained: dict[str, Tensor]) -> None:
        self._engine, self._trained = engine, trained

    def parts(self, *, gradients: bool = False) -> list[Part]:
        assert not gradients, "with ZeRO the gradients of an update are not to be seen before it"
        optimizer, found = self._engine.optimizer, []
        for name, parameter in self._trained.items():
            held: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if held is None:  # another rank's
                continue
            master = optimizer.single_partition_of_fp32_groups[held.param_group_index]
            here, there = held.hp_fragment_address, held.lp_fragment_address
            moments = {
                key: value.narrow(0, here.start, here.numel)
                for key, value in self._engine.basic_optimizer.state.get(master, {}).items()
                if isinstance(value, Tensor) and value.shape == master.shape
            }
            found.append(
                Part(
                    name=name, shape=tuple(parameter.shape), first=int(there.start), moments=moments,
                    weights=master.detach().narrow(0, here.start, here.numel),
                )
            )  # fmt: skip
        return found

    def forget(self) -> None:
        self._engine.basic_optimizer.state.clear()

    def publish(self) -> None:
        publish(self._engine)
