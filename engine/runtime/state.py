"""The whole state of a rank's training, for checkpoints: master weights, optimizer, loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from engine.config.enums import OptimizerName
from engine.optim.state import Slot
from engine.protocols import EngineState
from engine.runtime.flat import FlatOptimizer
from engine.runtime.shards import held_tensors

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's loss scaler counts with."""
_STEPS = "optimizer_steps"


def read_state(ds_optimizer: Any, name: OptimizerName) -> EngineState:
    """State of a `DeepSpeedEngine`'s `optimizer`, with no step under way; see `Engine.state`."""
    held = held_tensors(ds_optimizer, name)
    slots: list[Slot] = [slot for tensor in held for slot in tensor.slots()]
    numbers = {_STEPS: float(max((tensor.steps for tensor in held), default=0))}
    scaler = getattr(ds_optimizer, "loss_scaler", None)
    if scaler is not None and getattr(ds_optimizer, "dtype", None) is torch.float16:
        numbers |= {f"loss_scale.{key}": float(getattr(scaler, key)) for key in _SCALER if hasattr(scaler, key)}
    return EngineState(slots=slots, numbers=numbers)


@torch.no_grad()
def adopt_state(ds_optimizer: Any, name: OptimizerName, numbers: Mapping[str, float]) -> None:
    """Make everything follow what was written into the slots; see `Engine.adopt_state`. Collective."""
    steps = int(numbers[_STEPS])
    held = held_tensors(ds_optimizer, name)
    for tensor in held:
        tensor.count(steps)
    for optimizer in {tensor.optimizer for tensor in held}:
        if isinstance(optimizer, DeepSpeedCPUAdam):
            _repeat_steps(optimizer, steps)
    scaler = getattr(ds_optimizer, "loss_scaler", None)
    for key in _SCALER:
        found = numbers.get(f"loss_scale.{key}")
        if scaler is not None and found is not None and hasattr(scaler, key):
            setattr(scaler, key, type(getattr(scaler, key))(found))
    if isinstance(ds_optimizer, (DeepSpeedZeroOptimizer, FlatOptimizer)):
        ds_optimizer.update_lp_params()
    elif isinstance(ds_optimizer, DeepSpeedZeroOptimizer_Stage3):
        _refresh_partitions(ds_optimizer)


def _repeat_steps(optimizer: DeepSpeedCPUAdam, steps: int) -> None:
    """Let the step in host memory count to `steps`, on no elements.

    It multiplies the powers of the betas up from step to step, in fp32; beginning later, it would take powers, which
    differ in the last bit.
    """
    group, nothing = optimizer.param_groups[0], [torch.empty(0)] * 4
    options = [group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"]]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, *options, *nothing)


def _refresh_partitions(ds_optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """ZeRO 3: the parts in the dtype of the run, and the small parameters that every rank keeps whole."""
    ds_optimizer._partition_all_parameters()
    for index in range(len(ds_optimizer.fp16_groups)):
        ds_optimizer._reassign_or_swap_out_partitioned_parameters(index)
    whole: Iterable[Any] = ds_optimizer.persistent_parameters
    for parameter in whole:
        parameter.all_gather(whole)
        break
    ds_optimizer.invalidate_secondary_tensor()
