"""Reading gradients and master weights out of DeepSpeed, and the global norm where DeepSpeed has none that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from engine.dist.context import ParallelContext
from engine.parallel.logical import LogicalTensor, logical_of


def owned(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Each parameter of the stage once, without the copy of a tied weight that an earlier stage owns."""
    return (p for p in parameters if not getattr(p, "ds_pipe_replicated", False))


def full_gradient(parameter: nn.Parameter, zero_stage: int, loss_scale: float = 1.0) -> Tensor:
    """The averaged gradient of this rank's tensor-parallel slice, fp32, whole over dp. Collective over dp.

    Args:
        parameter: of the model that DeepSpeed holds.
        zero_stage: 0 to 3.
        loss_scale: what the gradients are still multiplied by, see `loss_scale_of`.
    """
    offloading = getattr(parameter, "_zero_optimizer", None)
    if offloading is not None:
        # Gradients travel to host memory beside the backward pass.
        offloading._wait_for_offload_copies()
    if zero_stage == 3:
        gradient = parameter._z3_optimizer.get_fp32_grad_for_param(parameter).float()  # type: ignore[attr-defined]
    elif zero_stage > 0:
        gradient = parameter.get_full_hp_grad()  # type: ignore[attr-defined]
    else:
        assert parameter.grad is not None, f"{logical_of(parameter).name} has no gradient"
        gradient = parameter.grad.float()
    return gradient if loss_scale == 1.0 else gradient / loss_scale


def loss_scale_of(optimizer: object) -> float:
    """The factor of the loss, and so of the gradients, in the step that runs: 1 but in fp16."""
    return float(getattr(optimizer, "loss_scale", 1.0))


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """The fp32 master of this rank's tensor-parallel slice, whole over dp. Collective over dp."""
    master = safe_get_full_fp32_param(parameter)
    return parameter.detach().float() if master is None else master


def read(
    parameters: Iterable[nn.Parameter], value: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[LogicalTensor, Tensor]]:
    """(logical tensor, value of this rank's slice) for each owned parameter."""
    for parameter in owned(parameters):
        yield logical_of(parameter), value(parameter)


def mend_norm(optimizer: object, ctx: ParallelContext) -> None:
    """Replace the global norm of DeepSpeed's optimizers by one that works on stages of any content.

    ZeRO 1 and 2 reduce once per parameter group, so a stage with fewer groups than another (an embedding has no
    undecayed parameters) hangs the job: https://github.com/deepspeedai/DeepSpeed/issues/1522. Here every rank takes
    part in one reduction.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.scaled_global_norm = partial(_zero_norm, optimizer, ctx)


def _zero_norm(optimizer: DeepSpeedZeroOptimizer, ctx: ParallelContext, norm_type: int = 2) -> Tensor:
    """The norm of the scaled gradients over all ranks: each rank adds the partition that it owns."""
    counted = [p for parameters in optimizer.params_in_partition for p in parameters if counts(p, ctx)]
    if optimizer.cpu_offload:
        # Taken on the GPU when the gradients left it; a parameter without a gradient has none.
        known, ids = optimizer.norm_for_param_grads, map(optimizer.get_param_id, counted)
        norms = [known[number].to(ctx.device, torch.float64) for number in ids if number in known]
    else:
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in _parts(optimizer, counted)]
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=ctx.device)
    dist.all_reduce(total)
    norm = total.sqrt().float()
    # Offloaded gradients are scaled where they lie, by a factor that must lie there too.
    return torch.where(norm.isfinite(), norm, torch.inf).to(optimizer.device)


def _parts(optimizer: DeepSpeedZeroOptimizer, wanted: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """This rank's parts of the gradients of `wanted`."""
    chosen = set(map(id, wanted))
    for index, parameters in enumerate(optimizer.params_in_partition):
        parts = (g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
        # What DeepSpeed pads a partition with stands last, and is not always marked.
        yield from (part for p, part in zip(parameters, parts, strict=False) if id(p) in chosen)


def counts(parameter: nn.Parameter, ctx: ParallelContext) -> bool:
    """Whether this rank counts it in a norm: slices always, whole tensors on tp rank 0, tied copies never."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return logical_of(parameter).dim is not None or ctx.tp.is_first


def counted_runs(parameters: Iterable[nn.Parameter], size: int, ctx: ParallelContext) -> list[tuple[int, int]]:
    """Stretches of this rank's `size` elements of flat `parameters` that it counts, neighbours joined."""
    first, runs, offset = ctx.reduce.rank * size, list[tuple[int, int]](), 0
    for parameter in parameters:
        start, stop = max(offset - first, 0), min(offset + parameter.numel() - first, size)
        offset += parameter.numel()
        if start >= stop or not counts(parameter, ctx):
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def norm_of_shards(shards: Iterable[Tensor], ctx: ParallelContext) -> Tensor:
    """L2 norm, fp64, of what all ranks have in `shards` together. Collective."""
    # torch's fp32 norm of a large tensor is off by 1e-6 on the CPU, and adds up in trees on GPUs.
    dtype = torch.float32 if ctx.device.type == "cuda" else torch.float64
    norms = [torch.linalg.vector_norm(shard, dtype=dtype) for shard in shards]
    total = torch.zeros((), dtype=torch.float64, device=ctx.device)
    if norms:
        total = torch.stack(norms).double().square().sum()
    dist.all_reduce(total)
    return total.sqrt()


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float, ctx: ParallelContext) -> Tensor:
    """Scale `.grad` in place so that the global L2 norm is at most `max_norm` (0: only measure). Returns the norm.

    With a norm that is not finite the gradients are dropped, so that the step changes nothing.

    Each logical element counts once: slices on every tp rank, whole tensors on the first, tied copies never. The
    replicas hold equal gradients, so the sum runs over one replica. It runs in fp64, as DeepSpeed's own: torch's fp32
    norm of a large tensor on the CPU is off by 1e-6 and more.
    """
    parameters = list(parameters)
    counted = [p for p in parameters if p.grad is not None and counts(p, ctx)]
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in counted]
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=ctx.device)
    if ctx.replica.group is not None:
        dist.all_reduce(total, group=ctx.replica.group)
    norm = total.sqrt()
    if not norm.isfinite():
        # As DeepSpeed's ZeRO optimizers do: an optimizer passes over parameters without a gradient.
        for parameter in parameters:
            parameter.grad = None
    elif max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
    return norm.float()
