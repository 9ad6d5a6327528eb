"""Reading gradients and master weights out of DeepSpeed, and the global norm where DeepSpeed has none that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from engine.dist.context import ParallelContext
from engine.parallel.logical import LogicalTensor, logical_of


def owned(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Each parameter of the stage once, without the copy of a tied weight that an earlier stage owns."""
    return (p for p in parameters if not getattr(p, "ds_pipe_replicated", False))


def full_gradient(parameter: nn.Parameter, zero_stage: int, partitioned: bool) -> Tensor:
    """The averaged gradient of this rank's tensor-parallel slice, fp32, whole over dp. Collective over dp."""
    if zero_stage == 3:
        return parameter._z3_optimizer.get_fp32_grad_for_param(parameter).float()  # type: ignore[attr-defined]
    if partitioned:
        return parameter.get_full_hp_grad()  # type: ignore[attr-defined]
    assert parameter.grad is not None, f"{logical_of(parameter).name} has no gradient"
    return parameter.grad.float()


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


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float, ctx: ParallelContext) -> Tensor:
    """Scale `.grad` in place so that the global L2 norm is at most `max_norm` (0: only measure). Returns the norm.

    Each logical element counts once: slices on every tp rank, whole tensors on the first, tied copies never. The
    replicas hold equal gradients, so the sum runs over one replica. It runs in fp64, as DeepSpeed's own: torch's fp32
    norm of a large tensor on the CPU is off by 1e-6 and more.
    """
    parameters = list(parameters)
    counted = [p for p in owned(parameters) if logical_of(p).dim is not None or ctx.tp.is_first]
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in counted if p.grad is not None]
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=ctx.device)
    if ctx.replica.group is not None:
        dist.all_reduce(total, group=ctx.replica.group)
    norm = total.sqrt()
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
    return norm.float()
