"""`DeepSpeedEngine` around an optimizer and passes that are not all its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as ds_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from engine.config.derived import has_own_stage3, offload_share, streams
from engine.config.enums import DType, Transport
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.parallel.symmetric import Mapped, require_mapped
from engine.runtime.ds_axes import Axes
from engine.runtime.ds_config import deepspeed_config, overlaps, sums_in_bf16
from engine.runtime.flat import FlatOptimizer
from engine.runtime.host_step import Streamed
from engine.runtime.mapped_shards import MappedShards
from engine.runtime.stage3 import Stage3


class Engine(DeepSpeedEngine):
    """Reduction, ZeRO, loss scale, offload and step are DeepSpeed's; in bf16 at ZeRO-1 `FlatOptimizer` does them.

    With `managed_gradient_accumulation` off, gradients add up until `reduce` is called. Collective.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, cfg: Config, ctx: ParallelContext, axes: Axes
    ) -> None:
        self._cfg, self._ctx = cfg, ctx
        ds_comm.init_distributed(dist_init_required=False)
        allow_fp16_on_cpus()
        config = deepspeed_config(cfg, ctx)
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            mpu=axes,
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config, axes),
        )
        self._configure_python_gc()

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> FlatOptimizer:
        return FlatOptimizer(
            optimizer,
            self._ctx,
            self.param_names,
            bf16_states=self._cfg.precision.states is DType.bf16,
            streamed=_streamed(self._cfg) if streams(self._cfg) else None,
            bucket_elements=self._cfg.zero.bucket_elements if overlaps(self._cfg, self._ctx) else None,
            bfloat16_config=self._config.bfloat16_config,
            mpu=self.mpu,
            clip_grad=self.gradient_clipping(),
            allgather_bucket_size=self.zero_allgather_bucket_size(),
            dp_process_group=self.seq_data_parallel_group,
            grad_acc_dtype=torch.bfloat16 if sums_in_bf16(self._cfg, self._ctx, optimizer) else torch.float32,
        )

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        found = super()._configure_zero_optimizer(optimizer)
        if has_own_stage3(self._cfg):
            Stage3.take_over(found, self._ctx)
            self._map_shards(found)
        return found

    def _map_shards(self, optimizer: Stage3) -> None:
        """Let copy engines gather parameters if `zero.gather` says so. Collective.

        Raises:
            LaunchError: see `require_mapped`.
        """
        replicas, old = self._ctx.reduce, optimizer.lp_param_buffer
        if self._cfg.zero.gather is not Transport.copy_engine or replicas.size == 1:
            return
        require_mapped(replicas, self._ctx.device, "zero.gather", "copy_engine", "nccl")
        memory = Mapped(old.numel(), old.dtype, old.device, replicas, self._cfg.train.timeout_s)
        shards = optimizer.shards = MappedShards(optimizer, memory, replicas.rank)
        # Before DeepSpeed's hook, which may gather already.
        self.module.register_forward_pre_hook(lambda *_: shards.before_reading(), prepend=True)

    def backward_from(self, output: Tensor, gradient: Tensor | None) -> None:
        """Backward pass of one chunk for one micro-batch, with the optimizer's bookkeeping around it."""
        if gradient is None:
            # A share of the loss. Shares are summed over the ranks, whose gradients DeepSpeed averages.
            output = output * float(self.mpu.get_data_parallel_world_size())
            if isinstance(self.optimizer, ZeROOptimizer):
                output = self.optimizer.scale_if_loss(output)
        with self.around_backward():
            torch.autograd.backward(output, gradient)

    @contextmanager
    def around_backward(self) -> Iterator[None]:
        """DeepSpeed's bookkeeping around a backward pass that it does not run itself.

        Reduces gradients after the last one of a step that it manages.
        """
        self._running_engine_backward = True
        try:
            if isinstance(self.optimizer, ZeROOptimizer):
                self.optimizer.clear_backward_seen_flag()
            self._backward_prologue()
            if self.zero_optimization_partition_gradients():
                # Else the first gradient does it, and a chunk of a tied table alone has none that DeepSpeed sees.
                self.optimizer.setup_buckets()
            yield
            self._backward_epilogue()
        finally:
            self._running_engine_backward = False

    def reduce(self) -> None:
        """Average the step's gradients over the ranks that share the data. As `DeepSpeedEngine.step` begins."""
        self._running_engine_step = True
        if self.zero_optimization_partition_gradients():
            self.optimizer.finalize_gradient_accumulation_boundary()
        else:
            self.allreduce_gradients()

    def settle(self) -> None:
        """Before weights or state are read: wait for a step that goes on in host memory. Collective."""
        if isinstance(self.optimizer, FlatOptimizer):
            self.optimizer.settle()

    def update(self) -> None:
        """Step the optimizer and drop the gradients."""
        lr_kwargs: Any = None
        self._take_model_step(lr_kwargs)
        self._running_engine_step = False


def allow_fp16_on_cpus() -> None:
    """Let DeepSpeed take fp16 on every CPU, as torch does; it asks oneDNN for instructions that few have.

    https://github.com/deepspeedai/DeepSpeed/issues/5718
    """
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True


def _streamed(cfg: Config) -> Streamed:
    return Streamed(share=offload_share(cfg), delayed=cfg.zero.offload_delay > 0, pin=cfg.zero.pin_memory)
