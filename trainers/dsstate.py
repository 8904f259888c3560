"""The float32 weights and moments that one rank holds inside DeepSpeed's optimizers: read, written, put back.

DeepSpeed's own checkpoints are pickles in subfolders; these are flat lists of tensors. A rank's share depends on the stage, the
number of ranks and the sizes in the configuration, so a state fits the same arrangement only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ttrl.errors import ConfigError


def masters(engine: Any) -> list[Tensor]:
    """This rank's share of the float32 weights, in DeepSpeed's order."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(optimizer.fp32_partitioned_groups_flat)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return list(optimizer.single_partition_of_fp32_groups)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return [p for group in optimizer.fp32_groups for p in group]
    if optimizer is engine.basic_optimizer:
        return [p for group in optimizer.param_groups for p in group["params"]]
    raise ConfigError(
        f"trainer.deepspeed: checkpoints of {type(optimizer).__name__} are not supported; leave optimizer and data_types as they are"
    )


def write(engine: Any, folder: Path, rank: int) -> None:
    """rank-NNNN.trained.safetensors, rank-NNNN.optimizer.safetensors, rank-NNNN.optimizer.json in `folder`."""
    trained = masters(engine)
    save_file(
        {f"{i:06d}": t.detach().cpu().contiguous().clone() for i, t in enumerate(trained)},
        _file(folder, rank, "trained"),
    )
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for i, master in enumerate(trained):
        for key, value in engine.basic_optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{i:06d}|{key}"] = value.detach().cpu().clone().reshape(value.shape or (1,))
            else:
                numbers[f"{i:06d}|{key}"] = value
    save_file(tensors, _file(folder, rank, "optimizer"))
    (folder / f"rank-{rank:04d}.optimizer.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")


@torch.no_grad()
def read(engine: Any, folder: Path, rank: int) -> None:
    """Undo `write`. Raises ConfigError when the state is of another arrangement."""
    trained = masters(engine)
    with safe_open(_file(folder, rank, "trained"), framework="pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if held != {f"{i:06d}": tuple(t.shape) for i, t in enumerate(trained)}:
            raise ConfigError(
                f"{folder}: holds other parameters than this recipe trains, or splits them in another way"
            )
        for i, master in enumerate(trained):
            master.data.copy_(file.get_tensor(f"{i:06d}"))
    state = engine.basic_optimizer.state
    state.clear()
    with safe_open(_file(folder, rank, "optimizer"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            i, _, key = name.partition("|")
            master, value = trained[int(i)], file.get_tensor(name)
            state[master][key] = value.reshape(()) if key == "step" else value.to(master.device)
    for name, number in json.loads((folder / f"rank-{rank:04d}.optimizer.json").read_text(encoding="utf-8")).items():
        i, _, key = name.partition("|")
        state[trained[int(i)]][key] = number
    publish(engine)


@torch.no_grad()
def publish(engine: Any) -> None:
    """The float32 weights into the model, on every rank: a collective."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
        for index in range(len(optimizer.bit16_groups)):
            optimizer._update_model_bit16_weights(index)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                parameter.data.copy_(master.data)


def forget_first_step(engine: Any) -> None:
    """FP16_UnfusedOptimizer takes a step on gradients of zero when it is built, which would count in Adam's bias correction."""
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.basic_optimizer.state.clear()


def _file(folder: Path, rank: int, what: str) -> Path:
    return folder / f"rank-{rank:04d}.{what}.safetensors"
