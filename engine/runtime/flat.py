"""ZeRO-1 in bf16: DeepSpeed's flat state, with every gradient element moved once and no wait for the device.

DeepSpeed's own step adds each gradient to a bf16 one, casts it, adds that to fp32 sums and zeroes both; it reduces the
sums over all ranks whole, and reads the norm back before it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine.dist.context import ParallelContext
from engine.optim.flat_adamw import FlatAdamW
from engine.runtime.buckets import Buckets, averages_well
from engine.runtime.gathers import Gathers
from engine.runtime.gradients import counted_runs, norm_of_shards
from engine.runtime.host_step import HostStep, Part, Streamed
from engine_kernels.ops import accumulation


class _NoMasters(TorchFunctionMode):
    """bf16 weights that DeepSpeed copies into fp32 stay bf16: no device need hold masters that nobody will step."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is Tensor.float else func(*args, **(kwargs or {}))


class FlatOptimizer(BF16_Optimizer):
    """DeepSpeed's optimizer over flat groups, whose layout and checkpoints it keeps.

    A gradient goes into the flat sums when the backward pass has it: the first of a step is copied, later ones are
    added. Sums are reduced, beside the last backward pass of a step, to the rank that holds their partition; its new
    weights can come back beside the next forward pass. With `FlatAdamW` the clip factor is applied inside the update,
    which also writes the bf16 weights, and a step whose norm is not finite is dropped on the device; other optimizers
    wait for the norm.

    Args:
        ctx: ranks and device.
        bf16_states: whether the bf16 weights are stepped themselves, by `FlatAdamW`, with bf16 moments.
        bucket_elements: elements of a bucket that is reduced while the backward pass goes on; None: all is reduced
            after it.
        streamed: the share of each partition, its end, that lives in host memory and is stepped there.
        others: as `BF16_Optimizer`; `grad_acc_dtype` bf16 is exact where a step has one gradient to add up.
    """

    # DeepSpeed's views of the weights would keep the nodes that add up gradients, each bound to the stream of now: a
    # CUDA graph that is recorded on another stream could not hold a backward pass.
    @torch.no_grad()
    def __init__(
        self,
        inner: torch.optim.Optimizer,
        ctx: ParallelContext,
        *others: Any,
        bf16_states: bool = False,
        bucket_elements: int | None = None,
        streamed: Streamed | None = None,
        **options: Any,
    ) -> None:
        self._ctx, self._accumulate, self._bf16_states = ctx, accumulation(ctx.device), bf16_states
        super().__init__(inner, *others, **options)
        assert self.immediate_grad_update
        if bf16_states:
            self._give_up_masters()
        self._host = None if streamed is None else self._move_out(streamed)
        sizes = [gradient.numel() for gradient in self.fp32_groups_gradients_flat]
        self._largest = sizes.index(max(sizes)) if sizes else 0
        self._buckets: Buckets | None = None
        if bucket_elements is not None and sizes and ctx.reduce.size > 1:
            self._buckets = Buckets(
                self.fp32_groups_gradients_flat[self._largest],
                [parameter.numel() for parameter in self.bf16_groups[self._largest]],
                self.dp_process_group,
                bucket_elements,
                average=averages_well(self.fp32_groups_gradients_flat[self._largest].dtype, self.dp_process_group),
            )
        self._gathers: Gathers | None = None
        self._runs: list[list[tuple[int, int]]] | None = None
        self._finite: Tensor | None = None
        self._known: torch.cuda.Event | None = None
        self._global_grad_norm = torch.zeros((), device=ctx.device)

    def _setup_for_real_optimizer(self) -> None:
        with _NoMasters() if self._bf16_states else nullcontext():
            super()._setup_for_real_optimizer()

    def clear_lp_grads(self, set_to_none: bool = False) -> None:
        """Nothing: a parameter's gradient is gone when the sums have it."""

    def clear_hp_grads(self) -> None:
        """Forget the sums: the next gradient is copied over them."""
        for group in self.fp32_groups_has_gradients:
            group[:] = [False] * len(group)

    @torch.no_grad()
    def _update_hp_grad(self, lp: nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        assert lp.grad is not None
        if self._host is not None:
            self._host.release_gradients()
        seen = self.fp32_groups_has_gradients[group_idx]
        total = self.fp32_groups_gradients[group_idx][param_idx].view(lp.shape)
        self._accumulate(total, lp.grad, first=not seen[param_idx])
        seen[param_idx] = True
        if self._buckets is not None and group_idx == self._largest and self.is_gradient_accumulation_boundary():
            self._buckets.complete(param_idx)

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average over the ranks that share the data; afterwards only this rank's partition is meant. Collective."""
        for group, totals in zip(self.fp32_groups_has_gradients, self.fp32_groups_gradients, strict=True):
            for has, total in zip(group, totals, strict=True):
                if not has:
                    total.zero_()
        if self._ctx.reduce.size == 1:
            return
        for index, (whole, mine) in enumerate(
            zip(self.fp32_groups_gradients_flat, self.fp32_groups_gradient_flat_partition, strict=True)
        ):
            average = averages_well(whole.dtype, self.dp_process_group)
            if self._buckets is not None and index == self._largest:
                self._buckets.finish()
            elif whole.is_cuda:
                operation = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
                dist.reduce_scatter_tensor(mine, whole, op=operation, group=self.dp_process_group)
            else:
                dist.all_reduce(whole, group=self.dp_process_group)
            if not average:
                mine.div_(self._ctx.reduce.size)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, update, and give every rank the new weights. Collective."""
        self._finish()
        norm = self._norm()
        finite = norm.isfinite()
        self._global_grad_norm = torch.where(finite, norm, torch.inf)
        factor = torch.ones_like(norm)
        if self.clip_grad > 0:
            factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        if isinstance(self.optimizer, FlatAdamW):
            factor = torch.where(finite, factor, torch.nan)
            self._tell(finite)
            if self._host is not None:
                self._host.begin(factor)
            self._update_in_one_pass(factor)
        elif bool(finite):
            self._update(factor)
        else:
            self.overflow = True
        if self._host is not None and not self._host.delayed:
            self._host.finish()
        self._gather(beside=True)
        self.clear_hp_grads()

    def gather_beside(self, layers: Iterable[Iterable[nn.Parameter]]) -> Callable[[int], None]:
        """Let each step's weights arrive while the next forward pass, in the order of `layers`, goes on.

        That calls what this returns, with the number of a layer, before the layer computes.
        """
        flat, parameters = self.bf16_groups_flat[self._largest], self.bf16_groups[self._largest]
        self._gathers = Gathers(flat, parameters, layers, self.dp_process_group)
        return self._gathers.wait_for

    @torch.no_grad()
    def settle(self) -> None:
        """Finish what is under way, and wait for it: before weights or state are read. Collective."""
        if self._finish():
            self._gather()

    def _finish(self) -> bool:
        """The weights that still arrive, the step in host memory, and the host's count of a step that was dropped.

        Returns whether this rank's partition has new weights by that.
        """
        if self._gathers is not None:
            self._gathers.finish()
        late = self._host is not None and self._host.finish()
        if self._known is not None:
            self._known.synchronize()
        self.overflow = self._finite is not None and not bool(self._finite)
        if self.overflow:
            assert isinstance(self.optimizer, FlatAdamW)
            self.optimizer.uncount()
        self._finite = self._known = None
        return late

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Give the model what the optimizer's tensors hold. Collective."""
        for stretches, weights in zip(self.stretches(), self._own_weights, strict=True):
            for start, tensor in stretches:
                weights[start : start + tensor.numel()].copy_(tensor.detach())
        self._gather()

    def stretches(self) -> list[list[tuple[int, Tensor]]]:
        """For each group, the tensors that the optimizer steps, and where each begins in this rank's partition."""
        found = [[(0, flat)] for flat in self.fp32_groups_flat_partition]
        if self._host is not None:
            for stretches, part in zip(found, self._host.parts, strict=True):
                stretches.append((stretches[0][1].numel(), part.state))
        return found

    @property
    def _own_weights(self) -> list[Tensor]:
        """This rank's partition of each group's bf16 weights."""
        return [partitions[self._ctx.reduce.rank] for partitions in self.bf16_partitioned_groups]

    def _give_up_masters(self) -> None:
        """Let the optimizer step this rank's partition of the bf16 weights in place of a copy."""
        for index, (group, mine) in enumerate(zip(self.optimizer.param_groups, self._own_weights, strict=True)):
            self.fp32_groups_flat_partition[index] = mine
            group["params"] = [mine]
        self._link_all_hp_params()
        if self._ctx.device.type == "cuda":
            # The copies' memory, whole, for the moments: activations would cut it up before the first step.
            torch.cuda.empty_cache()

    def _move_out(self, streamed: Streamed) -> HostStep:
        """Move the ends of what the optimizer steps to host memory."""
        assert isinstance(self.optimizer, FlatAdamW)
        parts, stay = list[Part](), list[Tensor]()
        for index, group in enumerate(self.optimizer.param_groups):
            whole, mine = self.fp32_groups_flat_partition[index].detach(), self._own_weights[index]
            cut = whole.numel() - round(whole.numel() * streamed.share)
            state = whole[cut:].to("cpu", copy=True)
            gradient = self.fp32_groups_gradient_flat_partition[index]
            parts.append(Part(group, state, gradient[cut:], mine[cut:]))
            # Weights that are their own masters stay where they are; of others nothing may hold the whole.
            stay.append(mine[:cut] if whole.dtype is mine.dtype else whole[:cut].clone())
            group["params"] = [stay[-1], state]
            self.fp32_groups_flat_partition[index] = mine
        self._link_all_hp_params()
        self.fp32_groups_flat_partition[:] = stay
        return HostStep(self.optimizer, parts, self._ctx.device, streamed)

    def _gather(self, *, beside: bool = False) -> None:
        """Give every rank all new weights; with `beside` those of the largest group while other work goes on."""
        later = self._gathers if beside else None
        now = [index for index in range(len(self.bf16_groups)) if later is None or index != self._largest]
        flat, partitions, groups = (
            [every[index] for index in now]
            for every in (self.bf16_groups_flat, self.bf16_partitioned_groups, self.real_dp_process_group)
        )
        all_gather_dp_groups(flat, partitions, groups, self.nccl_start_alignment_factor, self.allgather_bucket_size)
        if later is not None:
            later.begin()

    def _tell(self, finite: Tensor) -> None:
        """Let the host know by and by, without a wait for what is launched after."""
        self._finite = finite
        if finite.is_cuda:
            self._finite = torch.empty_like(finite, device="cpu", pin_memory=True).copy_(finite, non_blocking=True)
            self._known = torch.cuda.Event()
            self._known.record()

    def _update_in_one_pass(self, factor: Tensor) -> None:
        """What is on the device."""
        assert isinstance(self.optimizer, FlatAdamW)
        for group, flat, gradient, weights in zip(
            self.optimizer.param_groups,
            self.fp32_groups_flat_partition,
            self.fp32_groups_gradient_flat_partition,
            self._own_weights,
            strict=True,
        ):
            copy = None if flat.dtype is weights.dtype else weights[: flat.numel()]
            self.optimizer.update(group, flat, gradient[: flat.numel()], factor, copy_out=copy)

    def _update(self, factor: Tensor) -> None:
        """By an optimizer that knows neither factors nor copies."""
        partitions = list(zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True))
        for flat, gradient in partitions:
            flat.grad = gradient.to(flat.dtype).mul_(factor)
        self.optimizer.step()
        for (flat, _), weights in zip(partitions, self.bf16_partitioned_groups, strict=True):
            flat.grad = None
            weights[self._ctx.reduce.rank].copy_(flat)

    def _norm(self) -> Tensor:
        """Global L2 norm, fp32: each rank adds up its partition, of which each logical element counts once."""
        if self._runs is None:
            self._runs = [
                counted_runs(group, gradient.numel(), self._ctx)
                for group, gradient in zip(self.bf16_groups, self.fp32_groups_gradient_flat_partition, strict=True)
            ]
        counted = (
            gradient[start:stop]
            for gradient, runs in zip(self.fp32_groups_gradient_flat_partition, self._runs, strict=True)
            for start, stop in runs
        )
        return norm_of_shards(counted, self._ctx).float()
